"""BM25: Lucene's formula over Lucene's terms, ties by id, the same scores outside the index, files that are sound."""

import importlib.util
import itertools
import json
import math
import shutil
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralmspec.retrievers.analyzer import Analyzer
from ralmspec.retrievers.base import Document, Query, Ranking
from ralmspec.retrievers.bm25 import BM25
from ralmspec.retrievers.cache import SessionCache
from ralmspec.retrievers.errors import BadKnowledge, MissingExtra, RetrieverFailed
from ralmspec.retrievers.passages import Passages

for package in ("bm25s", "regex", "Stemmer"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package} (the extra 'local')", allow_module_level=True)

DEMO = Path(__file__).parent.parent / "examples" / "demo"
WORDS = ("ant", "bat", "cat", "dog", "elk")  # their own stems
JSON = ("vocab.index.json", "params.index.json", "analyzer.json")
ARRAYS = (
    *(f"{name}.csc.index.npy" for name in ("indptr", "indices", "data")),
    *(f"forward_{name}.npy" for name in ("starts", "terms", "weights")),
)
FILES = (*JSON, *ARRAYS)


def documents(texts: Sequence[str]) -> list[Document]:
    return [Document(row, "", text) for row, text in enumerate(texts)]


def silent(done: int, total: int) -> None:
    pass


def built(folder: Path, texts: Sequence[str], **options: float) -> BM25:
    passages = documents(texts)
    BM25.build(passages, folder, tell=silent, total=len(passages), **options)
    return BM25(passages, folder)


def query(text: str) -> Query:
    return Query(text=text)


def same(one: Ranking, other: Ranking) -> bool:
    return np.array_equal(one.ids, other.ids) and one.scores.tobytes() == other.scores.tobytes()


def plain_scores(passages: Sequence[Sequence[str]], asked: Sequence[str], k1: float, b: float) -> list[float]:
    """Lucene's BM25, written out: idf = ln(1 + (N - n + 1/2) / (n + 1/2)), tf / (tf + k1 (1 - b + b length/mean))."""
    mean = sum(map(len, passages)) / len(passages)
    holding = Counter(term for terms in passages for term in set(terms))
    scores = []
    for terms in passages:
        counts, score = Counter(terms), 0.0
        for term in asked:
            if counts[term]:
                idf = math.log(1 + (len(passages) - holding[term] + 0.5) / (holding[term] + 0.5))
                score += idf * counts[term] / (counts[term] + k1 * (1 - b + b * len(terms) / mean))
        scores.append(score)
    return scores


def by_definition(retriever: BM25, text: str, k: int) -> Ranking:
    """Score every passage, sort by (-score, id)."""
    ids = np.arange(len(retriever))
    scores = retriever.score(query(text), retriever.rows(ids))
    order = sorted(ids.tolist(), key=lambda id: (-float(scores[id]), id))[:k]
    return Ranking(np.array(order), scores[order])


# Terms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "terms"),  # as the EnglishAnalyzer of Lucene 9.9 answers
    [
        ("The dog's and dogs\u2019 DOGS\uff07S", "dog dog dog"),
        ("it's its 's s's yes's's", "it s s yes'"),
        ("U.S.A. 3.5 3,000.50 1\u20132 1/2 x:y 10:30 a.b. 1.a", "u.s.a 3.5 3,000.50 1 2 1 2 x:y 10 30 a.b 1"),
        ("don't don\u2019t O'Neil's rock'n'roll 'tis", "don't don\u2019t o'neil rock'n'rol ti"),
        ("foo_bar __ _x well-known AT&T C++ a b 7", "foo_bar _x well known t c b 7"),
        (
            "assembly assemblies possibly archaeology theology mythologie",
            "assembl assembl possibl archaeolog theologi mythologi",
        ),
        (
            "hoofbeats flies dying happily generalizations ties skies ay 0s",
            "hoofbeat fli dy happili gener ti ski ay 0s",
        ),
        (
            "na\u00efve Stra\u00dfe \u0130stanbul \u03a3\u039f\u03a6\u039f\u03a3",
            "na\u00efv stra\u00dfe istanbul \u03c3\u03bf\u03c6\u03bf\u03c3",
        ),
        ("cafe\u0301 a\u0308b x\u00ady", "cafe\u0301 a\u0308b x\u00ady"),
        ("東京 ひら カタカナ 한국어 สวัสดี हिन्दी שלום", "東 京 ひ ら カタカナ 한국어 สวัสดี हिन्दी שלום"),
        ("😀😀 👨\u200d👩\u200d👧 🇫🇷🇩🇪 x² ½ №5 ٣٤", "😀 😀 👨\u200d👩\u200d👧 🇫🇷 🇩🇪 x 5 ٣٤"),
        ("running-ran/runs\nnewline\ttab\r\nend", "run ran run newlin tab end"),
        ("to be or not to be --- !!! \u3000", ""),
    ],
)
def test_terms_are_those_of_lucene(text: str, terms: str) -> None:
    assert Analyzer()(text) == terms.split()


def test_half_a_character_separates() -> None:
    """JSON can hold lone surrogates, which no file of an index could."""
    assert Analyzer()("ant\ud800bat \udfff cat\udc00's") == ["ant", "bat", "cat", "s"]


@given(st.text(st.one_of(st.characters(), st.sampled_from("ab1. ,:'_\u0301\u200d\u202f\n東😀🇫")), max_size=80))
def test_a_text_is_its_chunks_between_blanks_however_often_they_were_seen(text: str) -> None:
    analyze = Analyzer()
    whole = list(analyze._terms_of_chunk(text))
    assert analyze(text) == whole
    assert analyze(text) == whole
    assert analyze(f"{text} {text}") == whole * 2
    assert all(term and term == "".join(term.split()) for term in whole)


# Scores and order --------------------------------------------------------------------------------------------------

TEXTS = (
    "cat dog",
    "ant bat cat cat",
    "",
    "cat dog",
    "elk the of and",
    "dog cat",
    "bat bat bat bat ant",
    "...",
    "cat dog elk \u6771 \u00c9lan",
)


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.2, 0.75), (0.0, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize(
    "text",
    ["cat", "dogs and cats", "cat cat elk", "ant bat cat dog elk", "\u6771 \u00e9lan", "bat unknown", "cat " * 300],
)
def test_scores_and_order_are_those_of_the_formula(tmp_path: Path, text: str, k1: float, b: float) -> None:
    (ranking,) = built(tmp_path, TEXTS, k1=k1, b=b).search([query(text)], 99)
    analyze = Analyzer()
    expected = plain_scores([analyze(passage) for passage in TEXTS], analyze(text), k1, b)
    assert ranking.ids.tolist() == sorted(range(len(TEXTS)), key=lambda id: (-round(expected[id], 6), id))
    assert ranking.scores == pytest.approx([expected[id] for id in ranking.ids], rel=1e-5)
    assert ranking.ids.dtype == np.int64
    assert ranking.scores.dtype == np.float32


@pytest.mark.parametrize("text", ["", "the of and", "unknown words", "?!"])
def test_a_query_without_known_terms_ranks_by_id(tmp_path: Path, text: str) -> None:
    retriever = built(tmp_path, TEXTS)
    for k in (1, 4, 50):
        (ranking,) = retriever.search(retriever.encode([query(text)]), k)
        assert ranking.ids.tolist() == list(range(min(k, len(TEXTS))))
        assert not ranking.scores.any()
    assert not retriever.score(query(text), retriever.rows(np.array([3, 1]))).any()


def test_passages_without_a_term_follow_by_id(tmp_path: Path) -> None:
    (ranking,) = built(tmp_path, TEXTS).search([query("elk")], 6)
    assert ranking.ids.tolist() == [4, 8, 0, 1, 2, 3]
    assert (ranking.scores > 0).tolist() == [True, True, False, False, False, False]


def test_the_title_is_indexed_and_word_order_and_case_do_not_matter(tmp_path: Path) -> None:
    passages = [Document(0, "Elk", "ant"), Document(1, "Bat", "cat's"), Document(2, "", "cat bat bat")]
    BM25.build(passages, tmp_path, tell=silent, total=3)
    retriever = BM25(passages, tmp_path)
    assert retriever.search([query("ELKS")], 1)[0].ids.tolist() == [0]
    one, other = retriever.search([query("cat the bat bat"), query("Bat? bat, cat!")], 3)
    assert same(one, other)
    assert one.ids.tolist()[0] == 2
    assert retriever.document(1) == passages[1]
    assert len(retriever) == 3
    assert retriever.concurrency == 1
    assert "3 passages, 4 terms, k1 0.9, b 0.4" in retriever.description


def texts_of(words: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from((*WORDS, "the")), max_size=words).map(" ".join)


@given(
    texts=st.lists(texts_of(6), min_size=1, max_size=40).filter(lambda texts: any(map(Analyzer(), texts))),
    copies=st.sampled_from([1, 3, 20]),
    asked=st.lists(texts_of(8), min_size=1, max_size=4),
    cuts=st.tuples(st.integers(1, 12), st.integers(1, 900)),
    capacity=st.sampled_from([2, 4096]),
)
@settings(max_examples=60, deadline=None)
def test_promises_on_passages_full_of_ties(
    texts: list[str], copies: int, asked: list[str], cuts: tuple[int, int], capacity: int
) -> None:
    """Up to 800 passages of five words: runs of equal scores at every cut, with groups of passages and without."""
    with TemporaryDirectory() as folder:
        retriever = built(Path(folder), texts * copies)
    queries = retriever.encode([query(text) for text in asked])
    few, many = min(cuts), max(cuts)
    cache = SessionCache(retriever, capacity)
    for q, short, long in zip(queries, retriever.search(queries, few), retriever.search(queries, many), strict=True):
        assert same(long, by_definition(retriever, q.text, many))
        assert same(short, long.top(few))  # whatever k
        assert same(short, retriever.search([q], few)[0])  # whatever the batch
        assert retriever.score(q, retriever.rows(long.ids)).tobytes() == long.scores.tobytes()
        guess = cache.best(q)
        if guess is not None and int(long.ids[0]) in cache:
            assert same(guess, long.top(1))
        cache.insert(long.ids, retriever.rows(long.ids))
        after = cache.best(q)
        assert after is not None
        assert same(after, long.top(1))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> BM25:
    with Passages(DEMO / "passages_wikipedia.jsonl.gz") as all_passages:
        passages = list(itertools.islice(all_passages, 2000))
    folder = tmp_path_factory.mktemp("demo")
    BM25.build(passages, folder, tell=silent, total=2000)
    return BM25(passages, folder)


def pieces(retriever: BM25, words: int) -> list[Query]:
    """Questions as a session asks them: pieces of English text, here of the passages."""
    texts = [retriever.document(id).text.split() for id in range(0, len(retriever), len(retriever) // 40)]
    return [query(" ".join(text[start : start + words])) for text in texts for start in (0, 11)]


def test_english_text_scores_as_the_formula_says(demo: BM25) -> None:
    analyze = Analyzer()
    passages = [demo.document(id) for id in range(len(demo))]
    terms = [analyze(f"{passage.title}\n{passage.text}") for passage in passages]
    for q in pieces(demo, 25)[:3]:
        expected = np.array(plain_scores(terms, analyze(q.text), 0.9, 0.4))
        (ranking,) = demo.search([q], 50)
        assert ranking.scores == pytest.approx(expected[ranking.ids], rel=1e-5)
        assert ranking.scores == pytest.approx(np.sort(expected)[::-1][:50], rel=1e-5)


def test_threads_and_batches_change_no_bit(demo: BM25) -> None:
    queries = pieces(demo, 25)
    alone = [by_definition(demo, q.text, 20) for q in queries[:6]]
    together = demo.search(queries, 20)
    assert all(map(same, alone, together))
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda q: demo.search([q], 20)[0], queries * 3))
        scores = list(pool.map(lambda q, r: demo.score(q, demo.rows(r.ids)).tobytes(), queries, together))
    assert all(map(same, threaded, together * 3))
    assert scores == [ranking.scores.tobytes() for ranking in together]


# Rows and refusals -------------------------------------------------------------------------------------------------


def test_rows_are_copied_ids(tmp_path: Path) -> None:
    retriever = built(tmp_path, TEXTS)
    ids = np.array([5, 2, 5])
    rows = retriever.rows(ids)
    ids[:] = 0
    assert rows.tolist() == [5, 2, 5]
    scores = retriever.score(query("dog"), rows)
    assert scores[0] == scores[2] > scores[1] == 0
    none = retriever.rows(np.array([], dtype=np.int64))
    assert none.shape == retriever.score(query("dog"), none).shape == (0,)
    for bad in ([-1], [0, 9]):
        with pytest.raises(BadKnowledge, match="there are 9"):
            retriever.rows(np.array(bad))
    for strange in (rows.astype(np.float32), rows.reshape(1, 3)):
        with pytest.raises(RetrieverFailed, match=r"rows must be int64 \[n\]"):
            retriever.score(query("dog"), strange)


def test_no_queries_no_rankings_and_no_search_for_nothing(tmp_path: Path) -> None:
    retriever = built(tmp_path, TEXTS)
    assert retriever.search([], 5) == []
    with pytest.raises(ValueError, match="at least 1"):
        retriever.search([query("dog")], 0)


@pytest.mark.parametrize("package", ["bm25s", "regex", "Stemmer"])
def test_without_its_packages_the_error_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    retriever = built(tmp_path, TEXTS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[local\]'"):
        BM25(retriever._passages, tmp_path)
    with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[local\]'"):
        BM25.build(documents(TEXTS), tmp_path, tell=silent, total=9)


# Building ----------------------------------------------------------------------------------------------------------


class Text(str):
    """A string that can be watched; a plain one cannot."""


def test_texts_are_read_once_and_let_go(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Text] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[Document]:
        nonlocal most
        for row in range(300):
            text = Text(f"{WORDS[row % 5]} number {row}")
            alive.add(text)
            most = max(most, len(alive))
            yield Document(row, "", text)

    BM25.build(stream(), tmp_path, tell=silent, total=300)
    assert most <= 3
    assert not alive
    passages = documents([f"{WORDS[row % 5]} number {row}" for row in range(300)])
    assert BM25(passages, tmp_path).search([query("cat 177")], 1)[0].ids.tolist() == [177]


def test_the_same_passages_make_the_same_bytes_and_no_pickle(tmp_path: Path) -> None:
    for name in ("one", "other"):
        built(tmp_path / name, TEXTS)
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert one == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert sorted(one) == sorted(FILES)
    for name in ARRAYS:
        np.load(tmp_path / "one" / name, allow_pickle=False)
    for name in JSON:
        json.loads(one[name])


def test_progress_rises_to_the_total(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    passages = documents(["cat dog"] * 4000)
    BM25.build(passages, tmp_path, tell=lambda done, total: told.append((done, total)), total=4000)
    assert {total for _, total in told} == {4000}
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert len(set(done)) > 3
    assert done[-1] == 4000


def test_what_cannot_be_indexed_is_refused(tmp_path: Path) -> None:
    for texts in ((), ("the", "...", "")):
        with pytest.raises(BadKnowledge, match=f"none of the {len(texts)} passages"):
            built(tmp_path, texts)
    with pytest.raises(BadKnowledge, match="passage 1 has the id 5"):
        BM25.build([Document(0, "", "cat"), Document(5, "", "dog")], tmp_path, tell=silent, total=2)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadKnowledge, match="cannot be written"):
        built(tmp_path / "file", TEXTS)
    for k1, b in ((-1, 0.4), (math.nan, 0.4), (math.inf, 0.4), (0.9, -0.1), (0.9, 1.1), (0.9, math.nan)):
        with pytest.raises(ValueError, match="k1 of at least 0 and b from 0 to 1"):
            built(tmp_path, TEXTS, k1=k1, b=b)


# Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, b"", b"\x00" * 200, b"[]", b'{"a": 1}', b"\x80\x04N."])
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    built(tmp_path, TEXTS)
    path = tmp_path / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BadKnowledge, match=f"^{path}: .*build the index again"):
        BM25(documents(TEXTS), tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_named(tmp_path: Path, name: str) -> None:
    built(tmp_path, TEXTS)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BadKnowledge, match=f"^{path}: "):
        BM25(documents(TEXTS), tmp_path)


@pytest.mark.parametrize("name", ("vocab.index.json", *ARRAYS))
def test_a_file_of_another_index_is_refused(tmp_path: Path, name: str) -> None:
    built(tmp_path / "ours", TEXTS)
    built(tmp_path / "theirs", [f"{text} fox {row} {'owl ' * row}" for row, text in enumerate(TEXTS)])
    shutil.copy(tmp_path / "theirs" / name, tmp_path / "ours" / name)
    with pytest.raises(BadKnowledge, match=f"^{tmp_path}/ours/"):
        BM25(documents(TEXTS), tmp_path / "ours")


def test_an_index_of_other_passages_is_refused(tmp_path: Path) -> None:
    built(tmp_path, TEXTS)
    with pytest.raises(BadKnowledge, match=r"params\.index\.json: num_docs is 9, not 8"):
        BM25(documents(TEXTS[:8]), tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("analyzer.json", {"analyzer": "english-0"}, "analyzer is 'english-0'"),
        ("params.index.json", {"method": "bm25l"}, "method is 'bm25l'"),
        ("params.index.json", {"idf_method": "atire"}, "idf_method is 'atire'"),
        ("params.index.json", {"k1": "0.9"}, "k1 and b must be numbers"),
        ("vocab.index.json", {"cat": 7}, "numbered from 0, in order"),
        ("vocab.index.json", {"new": 1}, "numbered from 0, in order"),
    ],
)
def test_facts_that_do_not_fit_are_refused(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    built(tmp_path, TEXTS)
    path = tmp_path / name
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(BadKnowledge, match=f"^{path}: .*{message}"):
        BM25(documents(TEXTS), tmp_path)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("indptr.csc.index.npy", 0, 1, "lists"),
        ("indptr.csc.index.npy", 2, 10**6, "lists"),
        ("indptr.csc.index.npy", -1, 0, "lists"),
        ("indices.csc.index.npy", 0, -1, "ascend"),
        ("indices.csc.index.npy", 1, 0, "ascend"),
        ("indices.csc.index.npy", -1, 9, "under 9"),
        ("forward_terms.npy", 0, 8, "under"),
        ("data.csc.index.npy", 3, math.nan, "not finite"),
        ("data.csc.index.npy", 3, math.inf, "not finite"),
        ("forward_weights.npy", 3, -1.0, "negative"),
    ],
)
@pytest.mark.parametrize("at_once", [1, 4, 1 << 22])
def test_numbers_that_make_no_sense_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, name: str, place: int, value: float, message: str
) -> None:
    monkeypatch.setattr("ralmspec.retrievers.bm25._CHUNK", at_once)
    built(tmp_path, TEXTS)
    path = tmp_path / name
    stored = np.load(path)
    stored[place] = value
    np.save(path, stored)
    with pytest.raises(BadKnowledge, match=f"^{path}: .*{message}"):
        BM25(documents(TEXTS), tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_whatever_byte_is_changed_the_index_loads_or_is_refused(tmp_path: Path, name: str) -> None:
    """A weight with another bit is for the manifest's hash to find; nothing may fail in any other way."""
    built(tmp_path, TEXTS)
    whole = (tmp_path / name).read_bytes()
    refused = 0
    for place, change in itertools.product(range(0, min(len(whole), 130), 3), (1, 0x80)):
        (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
        try:
            BM25(documents(TEXTS), tmp_path).search([query("cat dog")], 3)
        except BadKnowledge as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert refused
