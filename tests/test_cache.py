"""SessionCache: guesses as the index would rank, holds what was used last, and never more than it may."""

import importlib.util
import random
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ralmspec.retrievers.base import Document, Ids, Query, Ranking, Scores
from ralmspec.retrievers.cache import SessionCache
from ralmspec.retrievers.errors import RetrieverFailed

Q = Query(text="q", vector=np.ones(1, np.float32))


class Numbers:
    """A retriever whose rows are scores."""

    concurrency = 1
    description = "numbers"

    def __len__(self) -> int:
        return 1000

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        return list(queries)

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        raise NotImplementedError

    def rows(self, ids: Ids) -> NDArray[Any]:
        return ids.astype(np.float32)

    def score(self, query: Query, rows: NDArray[Any]) -> Scores:
        return rows.astype(np.float32)

    def document(self, id: int) -> Document:
        raise NotImplementedError


def cache(capacity: int = 100) -> SessionCache:
    return SessionCache(Numbers(), capacity)


def put(into: SessionCache, **scores: float) -> None:
    """put(c, d3=0.5): document 3 with score 0.5, best first as written."""
    into.insert(np.array([int(name[1:]) for name in scores]), np.array(list(scores.values()), np.float32))


def guess(of: SessionCache, n: int = 1) -> list[int]:
    ranking = of.best(Q, n)
    return [] if ranking is None else ranking.ids.tolist()


def test_an_empty_cache_has_no_guess() -> None:
    empty = cache()
    assert empty.best(Q) is None
    empty.insert(np.array([], dtype=np.int64), np.array([], dtype=np.float32))
    assert empty.best(Q) is None
    assert len(empty) == 0


def test_best_first_and_ties_by_smallest_id() -> None:
    some = cache()
    put(some, d9=0.5, d4=0.9, d2=0.5, d7=0.9)
    assert guess(some) == [4]
    assert guess(some, 3) == [4, 7, 2]
    assert guess(some, 10) == [4, 7, 2, 9]
    ranking = some.best(Q, 2)
    assert ranking is not None
    assert ranking.ids.dtype == np.int64
    assert ranking.scores.dtype == np.float32


def test_a_known_document_keeps_its_row_and_place() -> None:
    some = cache()
    put(some, d1=0.5, d2=0.4)
    put(some, d1=0.0)
    assert guess(some, 5) == [1, 2]
    assert len(some) == 2
    assert 1 in some
    assert 3 not in some


def test_evicts_what_was_inserted_or_guessed_longest_ago() -> None:
    some = cache(capacity=3)
    put(some, d1=0.9)
    put(some, d2=0.1)
    put(some, d3=0.2)
    assert guess(some) == [1]
    put(some, d2=0.1)
    put(some, d4=0.3)  # 3 is now the longest unused
    assert [id in some for id in (1, 2, 3, 4)] == [True, True, False, True]
    assert guess(some, 4) == [1, 4, 2]


def test_of_a_wide_result_the_best_stay() -> None:
    some = cache(capacity=3)
    put(some, d1=0.9, d2=0.8, d3=0.7, d4=0.6, d5=0.5)
    assert guess(some, 9) == [1, 2, 3]
    put(some, d6=0.1, d7=0.05)  # evicts the worst first
    assert guess(some, 9) == [1, 6, 7]


class Plain:
    """What a cache must do, one document at a time: an id and its row, longest unused first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = OrderedDict[int, float]()

    def insert(self, ids: list[int], rows: list[float]) -> None:
        first = dict[int, float]()
        for id, row in list(zip(ids, rows, strict=True))[: self.capacity]:
            first.setdefault(id, row)
        for id in reversed(first):
            self.held.setdefault(id, first[id])
            self.held.move_to_end(id)
        while len(self.held) > self.capacity:
            self.held.popitem(last=False)

    def best(self, n: int) -> list[tuple[int, float]]:
        found = sorted(self.held.items(), key=lambda entry: (-entry[1], entry[0]))[:n]
        for id, _ in reversed(found):
            self.held.move_to_end(id)
        return found

    def missing(self, ids: list[int]) -> list[int]:
        return [id for id in dict.fromkeys(ids) if id not in self.held]


class Pair:
    """A cache and the plain one side by side: every move is made in both, and everything compared after it."""

    def __init__(self, capacity: int, ids: int) -> None:
        self.cache, self.plain, self.ids = cache(capacity), Plain(capacity), ids

    def insert(self, ids: list[int], rows: list[float]) -> None:
        self.cache.insert(np.array(ids, np.int64), np.array(rows, np.float32))
        self.plain.insert(ids, rows)
        self.compare()

    def best(self, n: int) -> None:
        ranking = self.cache.best(Q, n)
        found = [] if ranking is None else list(zip(ranking.ids.tolist(), ranking.scores.tolist(), strict=True))
        assert found == self.plain.best(n)
        self.compare()

    def compare(self) -> None:
        assert len(self.cache) == len(self.plain.held)
        assert [id in self.cache for id in range(10)] == [id in self.plain.held for id in range(10)]
        self.ask(list(range(self.ids)))

    def ask(self, ids: list[int]) -> None:
        missing = self.cache.missing(np.array(ids, np.int64))
        assert missing.dtype == np.int64
        assert missing.tolist() == self.plain.missing(ids)

    def empty(self) -> None:
        """In which order everything goes, seen one by one."""
        for stranger in range(self.ids, self.ids + self.plain.capacity):
            self.insert([stranger], [-1.0])


_SOME_IDS = st.lists(st.integers(0, 9), max_size=9)


@given(
    capacity=st.integers(1, 8),
    moves=st.lists(
        st.one_of(
            st.tuples(st.just("insert"), _SOME_IDS),
            st.tuples(st.just("ask"), _SOME_IDS),
            st.tuples(st.just("best"), st.integers(1, 9)),
        )
    ),
    rows=st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_agrees_with_a_plain_least_recently_used_dictionary(
    capacity: int, moves: list[tuple[str, Any]], rows: random.Random
) -> None:
    """Ids that come twice, inserts wider than the cache, scores that are equal, rows that come again: all in here."""
    pair = Pair(capacity, ids=10)
    for move, what in moves:
        if move == "insert":
            pair.insert(what, [float(rows.randrange(6)) for _ in what])
        elif move == "ask":
            pair.ask(what)
        else:
            pair.best(what)
    pair.empty()


@pytest.mark.parametrize("capacity", [64, 200, 1000])
def test_agrees_with_the_plain_one_over_long_sessions(capacity: int) -> None:
    """Caches that are full, with insertions from one document to more than all, and guesses between them."""
    chance = random.Random(capacity)
    pair = Pair(capacity, ids=3 * capacity)
    for _ in range(250):
        kind = chance.random()
        if kind < 0.25:
            pair.best(chance.choice([1, 1, 5, capacity // 2, capacity]))
            continue
        n = chance.choice([1, 2, 5, 20, capacity // 3, capacity + 7])
        ids = [chance.randrange(pair.ids) for _ in range(n)]
        pair.ask(ids)
        ids = pair.plain.missing(ids) if kind < 0.5 else ids
        pair.insert(ids, [chance.randrange(64) / 64 for _ in ids])
    pair.empty()


def test_what_is_missing_comes_in_order_and_once() -> None:
    some = cache()
    assert some.missing(np.array([7, 3, 7])).tolist() == [7, 3]  # of an empty cache
    put(some, d3=0.1, d5=0.2)
    missing = some.missing(np.array([9, 3, 1, 9, 5, 2, 1]))
    assert missing.tolist() == [9, 1, 2]
    assert missing.dtype == np.int64
    assert some.missing(np.array([], dtype=np.int64)).tolist() == []
    put(some, d8=0.3)
    assert some.missing(np.array([3, 5])).tolist() == []  # asking is no use: nothing changed, nothing went
    assert len(some) == 3


def test_asking_is_not_using() -> None:
    some = cache(capacity=2)
    put(some, d1=0.1)
    put(some, d2=0.2)
    assert 1 in some
    some.missing(np.array([1]))
    put(some, d3=0.3)
    assert [id in some for id in (1, 2, 3)] == [False, True, True]


def test_an_id_that_comes_twice_takes_one_place_and_its_first() -> None:
    some = cache(capacity=3)
    some.insert(np.array([4, 6, 4, 6]), np.array([0.5, 0.4, 0.0, 0.0], np.float32))
    assert len(some) == 2
    ranking = some.best(Q, 5)
    assert ranking is not None
    assert ranking.ids.tolist() == [4, 6]
    assert ranking.scores.tolist() == [0.5, np.float32(0.4)]
    put(some, d7=0.1)
    some.insert(np.array([4, 7, 6, 4]), np.zeros(4, np.float32))  # 4 first, whatever stands behind it
    put(some, d8=0.1, d9=0.1)
    assert [id in some for id in (4, 6, 7, 8, 9)] == [True, False, False, True, True]


def test_ids_of_any_size() -> None:
    some, far = cache(), np.iinfo(np.int64).max
    some.insert(np.array([far, 0, -far]), np.array([0.1, 0.2, 0.3], np.float32))
    assert guess(some, 3) == [-far, 0, far]
    assert some.missing(np.array([far, far - 1, -far, 1 - far])).tolist() == [far - 1, 1 - far]


def test_rows_may_be_objects() -> None:
    """A sparse retriever keeps whatever it scores by."""
    retriever = Numbers()
    retriever.score = lambda query, rows: np.array([len(row) for row in rows], np.float32)  # type: ignore[method-assign]
    some = SessionCache(retriever, capacity=70)
    rows = np.empty(100, dtype=object)
    rows[:] = [{"term": i} if i % 2 else {"term": i, "other": i} for i in range(100)]
    some.insert(np.arange(100), rows)
    assert len(some) == 70
    assert guess(some, 2) == [0, 2]


def test_scores_a_view_of_contiguous_rows() -> None:
    seen: list[NDArray[Any]] = []
    retriever = Numbers()
    retriever.score = lambda query, rows: seen.append(rows) or rows[:, 0]  # type: ignore[method-assign,func-returns-value]
    some = SessionCache(retriever)
    for i in range(300):
        some.insert(np.array([i]), np.full((1, 4), i, np.float32))
    some.best(Q)
    assert seen[0].shape == (300, 4)
    assert seen[0].flags.c_contiguous
    assert not seen[0].flags.owndata


def test_never_takes_more_memory_than_its_capacity() -> None:
    seen: list[NDArray[Any]] = []
    retriever = Numbers()
    retriever.score = lambda query, rows: seen.append(rows) or rows  # type: ignore[method-assign,func-returns-value]
    some = SessionCache(retriever, capacity=100)
    for i in range(150):
        some.insert(np.arange(i, i + 2), np.zeros(2, np.float32))
        some.best(Q)
    rooms = [len(rows.base) for rows in seen if rows.base is not None]
    assert max(rooms) == 100
    assert len(set(rooms)) <= 3  # it doubles: growing by one document at a time would copy everything each time


def test_a_score_that_is_nan_is_an_error_and_no_guess() -> None:
    some = cache()
    put(some, d1=0.5, d2=float("nan"))
    with pytest.raises(RetrieverFailed, match="document 2 scored NaN"):
        some.best(Q)


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="at least 1 document"):
        cache(0)
    with pytest.raises(ValueError, match="2 ids came with 1 rows"):
        cache().insert(np.array([1, 2]), np.array([1.0], np.float32))


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs faiss (the extra 'local')")
@given(
    seed=st.integers(0, 2**32),
    integers=st.booleans(),
    prefetch=st.sampled_from([1, 20]),
    capacity=st.sampled_from([8, 4096]),
)
@settings(max_examples=40, deadline=None)
def test_a_cached_first_document_is_the_guess_with_the_index_score(
    seed: int, integers: bool, prefetch: int, capacity: int
) -> None:
    """Promise 2, on a walk of queries: real-valued vectors, and integer ones where exact ties abound."""
    from ralmspec.retrievers.dense import ExactDense

    random = np.random.default_rng(seed)
    vectors = random.integers(-1, 2, (600, 12)) if integers else random.standard_normal((600, 12))
    walk = np.cumsum(random.integers(-1, 2, (12, 12)) if integers else random.standard_normal((12, 12)), axis=0)
    passages = [Document(i, "", "") for i in range(600)]
    encoder: Any = SimpleNamespace(dimension=12)
    retriever = ExactDense(passages, vectors.astype(np.float32), encoder, blas_threshold=1)
    some = SessionCache(retriever, capacity)
    queries = [Query(text="q", vector=step.astype(np.float32)) for step in walk]
    for query, ranking in zip(queries, retriever.search(queries, prefetch), strict=True):
        cached = {int(id): score for id, score in zip(ranking.ids, ranking.scores, strict=True) if int(id) in some}
        everything = some.best(query, len(some)) if len(some) else None
        if everything is not None:
            if int(ranking.ids[0]) in some:
                assert everything.ids[0] == ranking.ids[0]
            scores = dict(zip(everything.ids.tolist(), everything.scores, strict=True))
            assert all(scores[id].tobytes() == score.tobytes() for id, score in cached.items())
        some.insert(ranking.ids, retriever.rows(ranking.ids))
        assert len(some) <= capacity
        guess_now = some.best(query)
        assert guess_now is not None
        assert guess_now.ids.tolist() == ranking.ids[:1].tolist()
        assert guess_now.scores.tobytes() == ranking.scores[:1].tobytes()
