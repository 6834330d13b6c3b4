"""ForwardIndex: Lucene's BM25 for chosen documents, in float32 as Lucene computes it, from mapped files."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ralmspec.retrievers.errors import BadKnowledge
from ralmspec.retrievers.forward import LENGTHS, ForwardIndex, ForwardWriter, is_exact

NAMES = ("starts", "terms", "counts", "lengths", "frequencies")
DOCUMENTS = [
    ["cat", "dog", "cat"],
    [],
    ["dog"],
    ["emu", "cat", "dog", "dog", "dog"],
    ["gnu"] * 300 + ["cat"] * 41,
]


def written(folder: Path, documents: list[list[str]]) -> ForwardIndex:
    with ForwardWriter(folder) as writer:
        for tokens in documents:
            writer.add(tokens)
        writer.finish()
    index = ForwardIndex(folder)
    held = [len(tokens) for tokens in documents if tokens]
    index.weigh_lengths(sum(held) / len(held), 0.9, 0.4)
    return index


def by_definition(documents: list[list[str]], weights: dict[str, np.float32], row: int) -> np.float32:
    """One document's score, an operation at a time, each rounded to float32 as Java rounds it."""
    held = [len(tokens) for tokens in documents if tokens]
    average = np.float32(sum(held) / len(held))
    one, k1, b = np.float32(1), np.float32(0.9), np.float32(0.4)
    length = np.float32(max(kept for kept in LENGTHS.tolist() if kept <= len(documents[row])))
    inverse = one / (k1 * ((one - b) + b * length / average))
    total = 0.0
    for term, count in Counter(documents[row]).items():
        if term in weights:
            total += float(weights[term] - weights[term] / (one + np.float32(count) * inverse))
    return np.float32(total)


def test_lengths_are_kept_as_lucene_keeps_them() -> None:
    assert LENGTHS[:41].tolist() == list(range(41))
    assert LENGTHS[41:50].tolist() == [42, 44, 46, 48, 50, 52, 54, 56, 60]
    assert len(LENGTHS) == 256
    assert LENGTHS[255] == 2_013_265_944  # the largest that stays under 2^31
    assert (np.diff(LENGTHS) > 0).all()


@given(
    documents=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=70), min_size=1, max_size=12).filter(any),
    query=st.lists(st.sampled_from("abcdefghz"), max_size=12),
    odds=st.floats(1e-3, 1e4),
)
@settings(max_examples=40, deadline=None)
def test_scores_are_bm25_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[str]], query: list[str], odds: float
) -> None:
    index = written(tmp_path_factory.mktemp("forward"), documents)
    counts = index.look_up(query)
    assert sorted(counts.values()) == sorted(Counter(t for t in query if any(t in d for d in documents)).values())
    terms = np.array(list(counts), dtype=np.uint32)
    weights = np.array([np.float32(count * math.log1p(odds)) for count in counts.values()], dtype=np.float32)
    rows = np.arange(len(documents))[::-1].copy()
    scores = index.score(terms, weights, rows)
    named = {
        token: weight
        for token in set(query)
        for id, weight in zip(counts, weights, strict=True)
        if index.look_up([token]) == {id: 1}
    }
    assert scores.dtype == np.float32
    assert scores.tolist() == [by_definition(documents, named, row) for row in rows]


def test_terms_that_agree_in_their_low_bits_are_told_apart(tmp_path: Path) -> None:
    documents = [[str(n) for n in range(start, start + 7000)] for start in range(0, 140_000, 7000)]
    index = written(tmp_path, documents)
    ids = np.arange(len(documents))
    for asked, place in (("3", 0), (str(3 + 65_536), 9), (str(3 + 2 * 65_536), 18)):
        (term,) = index.look_up([asked])
        scores = index.score(np.array([term], np.uint32), np.ones(1, np.float32), ids)
        assert np.flatnonzero(scores).tolist() == [place]


def test_documents_may_repeat_and_come_in_any_order_or_not_at_all(tmp_path: Path) -> None:
    index = written(tmp_path, DOCUMENTS)
    counts = index.look_up(["dog", "cat"])
    terms, weights = np.array(list(counts), np.uint32), np.array([1.5, 2.5], np.float32)
    every = index.score(terms, weights, np.arange(5))
    assert every[1] == 0
    assert (every[[0, 2, 3, 4]] > 0).all()
    order = np.array([4, 0, 4, 1, 3])
    assert index.score(terms, weights, order).tolist() == every[order].tolist()
    assert index.score(terms, weights, np.array([], dtype=np.int64)).tolist() == []
    assert index.score(terms[:0], weights[:0], order).tolist() == [0] * 5
    assert index.score(terms, weights, np.array([1, 1])).tolist() == [0, 0]
    index.fetch(np.array([], dtype=np.int64))
    assert len(index) == 5
    assert index.postings == 8
    assert [index.frequencies[id] for token in ("cat", "dog", "emu") for id in index.look_up([token])] == [3, 3, 1]


@given(
    weights=st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=30),
    factors=st.lists(st.floats(1e-6, 1e4), min_size=30, max_size=30),
    order=st.permutations(range(30)),
)
def test_where_a_query_is_exact_no_order_of_addition_matters(
    weights: list[float], factors: list[float], order: list[int]
) -> None:
    held = np.array(weights, dtype=np.float32)
    shares = held - held / (np.float32(1) + np.array(factors[: len(held)], dtype=np.float32))
    assume(is_exact(held))
    there = [float(shares[place]) for place in order if place < len(held)]
    assert sum(there) == math.fsum(there)


def test_weights_too_far_apart_are_not_exact() -> None:
    assert is_exact(np.array([], dtype=np.float32))
    assert is_exact(np.array([1e-6, 100], dtype=np.float32))
    assert not is_exact(np.array([1e-8, 100], dtype=np.float32))


def test_words_beyond_what_a_count_holds_are_refused(tmp_path: Path) -> None:
    with ForwardWriter(tmp_path) as writer:
        writer.add(["a"] * 65_535)
        with pytest.raises(BadKnowledge, match="split it"):
            writer.add(["a"] * 65_536)


def test_the_same_documents_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, DOCUMENTS)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted([f"forward_{name}.npy" for name in NAMES] + ["vocabulary.txt"])
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert np.load(tmp_path / "one" / "forward_counts.npy").tolist() == [2, 1, 1, 1, 1, 3, 300, 41]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_not_one_of_these_is_named(tmp_path: Path, name: str) -> None:
    written(tmp_path, DOCUMENTS)
    path = tmp_path / f"forward_{name}.npy"
    whole = path.read_bytes()
    column = np.load(path)
    for spoil in (
        lambda: path.write_bytes(whole[:-1]),
        lambda: path.write_bytes(b""),
        lambda: np.save(path, column.astype(np.float32)),
        lambda: np.save(path, column[np.newaxis]),
        lambda: path.unlink(),
    ):
        spoil()
        with pytest.raises(BadKnowledge, match=rf"^{path}: "):
            ForwardIndex(tmp_path)
    np.save(path, np.append(column, column[-1:]))  # one entry too many
    with pytest.raises(BadKnowledge, match="build the index again"):
        ForwardIndex(tmp_path)


def test_a_vocabulary_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    written(tmp_path, DOCUMENTS)
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(b"\xff\n")
    with pytest.raises(BadKnowledge, match=rf"^{path}: "):
        ForwardIndex(tmp_path)
    path.unlink()
    with pytest.raises(BadKnowledge, match=rf"^{path}: "):
        ForwardIndex(tmp_path)
