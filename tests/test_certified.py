"""A guess that an earlier search proves needs no check: the bound holds, and cache and session make use of it.

The bound is also held against a search for its worst case; the oracle tests of every arrangement are in
`test_same_output*.py`, random schedules in `test_schedules.py`.
"""

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import run
from fakes import Certifying, FakeModel, FakeRetriever, Guessing, fixed
from hand import Hand
from oracle import sequential
from simulation import Eager

from ralmspec.pipeline import Answer, Continuous, Pipeline, Retrying, Sequential, Speculation, Synchronous, published
from ralmspec.retrievers.base import Query, Ranking, bound_of
from ralmspec.retrievers.cache import SessionCache
from ralmspec.retrievers.drift import product_bound
from ralmspec.retrievers.latency import SetLatency
from ralmspec.stages.messages import Decoded

DEMO = Path(__file__).parent.parent / "examples" / "demo"
PROMPT = "3 1 4 1 5"
Vectors = np.ndarray[Any, np.dtype[np.float32]]


# The bound of inner products ------------------------------------------------------------------------------------


def lengths(vectors: Vectors) -> Vectors:
    return np.asarray(np.linalg.norm(vectors.astype(np.float64), axis=-1))


def scores(vectors: Vectors, query: Vectors) -> Vectors:
    """In float32, in the order of the numbers: one of the roundings that a kernel may have."""
    total = np.zeros(len(vectors), dtype=np.float32)
    for column in range(vectors.shape[1]):
        total += vectors[:, column] * query[column]
    return total


@pytest.mark.parametrize("dimension", [1, 2, 3, 17, 384])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_nothing_that_was_left_out_passes_the_bound(dimension: int, scale: float) -> None:
    random = np.random.default_rng(dimension)
    for turn in (0.0, 1e-7, 0.01, 0.3, 2.0, 1e3):
        vectors = random.standard_normal((400, dimension)).astype(np.float32) * np.float32(scale)
        past = random.standard_normal(dimension).astype(np.float32)
        query = (past + turn * random.standard_normal(dimension)).astype(np.float32)
        # Some lie along the queries, where the bound is reached, and some are short.
        vectors[:50] = query * random.uniform(-1, 1, (50, 1)) * np.float32(scale)
        vectors[50:100] = past * random.uniform(-1, 1, (50, 1)) * np.float32(scale)
        vectors[100:150] *= random.uniform(0, 1, (50, 1)).astype(np.float32)
        before, asked, longest = scores(vectors, past), scores(vectors, query), float(lengths(vectors).max())
        for floor in np.quantile(before, [0.0, 0.1, 0.5, 0.9, 1.0]):
            left = asked[before <= floor]
            assert left.max() <= product_bound(query, past, float(floor), longest)


@pytest.mark.parametrize("dimension", [2, 5, 384])
def test_the_bound_is_no_higher_than_it_must_be(dimension: int) -> None:
    """The worst vector lies in the plane of both queries; here are all directions in it."""
    random, turns = np.random.default_rng(7), np.linspace(0, 2 * np.pi, 20_001)
    for _ in range(50):
        past, query = random.standard_normal((2, dimension)).astype(np.float32)
        along = past / lengths(past)
        across = query - (query @ along) * along
        plane = np.outer(np.cos(turns), along) + np.outer(np.sin(turns), across / lengths(across))
        floor = random.uniform(-0.9, 0.9) * float(lengths(past))
        most = float((plane @ query)[plane @ past <= floor].max())
        assert most <= product_bound(query, past, floor, 1.0) <= most + 2e-3 * float(lengths(query))


def test_what_tells_nothing_bounds_by_length_alone() -> None:
    zero, query = np.zeros(4, dtype=np.float32), np.full(4, 0.5, dtype=np.float32)
    assert product_bound(query, zero, 0.0, 2.0) == pytest.approx(2.0)
    assert 0 <= product_bound(zero, query, 0.0, 2.0) < 1e-3
    assert product_bound(query, -query, 1e9, 2.0) == pytest.approx(2.0), "a floor that no vector reaches"


def test_a_search_of_the_index_bounds_what_it_left_out() -> None:
    """Real vectors; queries drift from one passage towards another, and everything left out is scored."""
    pytest.importorskip("faiss", reason="needs ralmspec[local]")
    from ralmspec.retrievers.dense import ExactDense

    vectors = np.load(DEMO / "embeddings_wikipedia_minilm_f16.npy").astype(np.float32)
    index = ExactDense([None] * len(vectors), vectors, Encoder(vectors.shape[1]))  # type: ignore[list-item]
    every = np.arange(len(vectors))
    for start, end in ((5, 900), (77, 78), (4000, 4001)):
        past = Query(text="", vector=vectors[start])
        for k in (1, 20, 512):
            (found,) = index.search([past], k)
            left = index.rows(np.setdiff1d(every, found.ids))
            for share in (0.0, 0.05, 0.3, 1.0):
                query = Query(text="", vector=vectors[start] * (1 - share) + vectors[end] * share)
                assert index.score(query, left).max() <= index.bound(query, past, found)
    (everything,) = index.search([past], len(vectors))
    assert index.bound(past, past, everything) == -math.inf, "nothing was left out"


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_the_bound_holds_for_distractors_and_half_precision_too(kind: Any) -> None:
    """A padded index leaves out distractors as well."""
    pytest.importorskip("faiss", reason="needs ralmspec[local]")
    from ralmspec.retrievers.padded import PaddedDense, with_distractors

    vectors = np.load(DEMO / "embeddings_wikipedia_minilm_f16.npy").astype(kind)[:200]
    index = PaddedDense([None] * 200, vectors, Encoder(vectors.shape[1]), pad_to=4000)  # type: ignore[list-item]
    every = with_distractors(vectors.astype(np.float32), 4000, noise=0.5, norm=0.25, seed=0)
    past, query = (Query(text="", vector=vectors[n].astype(np.float32)) for n in (3, 4))
    (found,) = index.search([past], 5)
    left = np.delete(every, found.ids, axis=0)
    assert index.score(query, left).max() <= index.bound(query, past, found)


def test_of_distances_and_approximate_searches_nothing_is_known() -> None:
    pytest.importorskip("faiss", reason="needs ralmspec[local]")
    from ralmspec.retrievers.dense import ExactDense
    from ralmspec.retrievers.hnsw import HNSWDense
    from ralmspec.retrievers.vectors import Vectors

    near = Vectors.open(np.eye(4, dtype=np.float32), metric="squared L2")
    index = ExactDense([None] * 4, near, Encoder(4))  # type: ignore[list-item]
    query = Query(text="", vector=np.ones(4, dtype=np.float32))
    assert index.bound(query, query, index.search([query], 2)[0]) == math.inf
    assert bound_of(HNSWDense) is None and bound_of(ExactDense) is not None


class Encoder:
    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def encode(self, texts: Any) -> Any:
        raise AssertionError("vectors are given")


def test_what_stands_before_an_index_passes_its_bound_on() -> None:
    query, found = Query(text=""), Ranking(np.array([0]), np.zeros(1, dtype=np.float32))

    class Bound(FakeRetriever):
        def bound(self, query: Query, past: Query, found: Ranking) -> float:
            return 7.0

    for wrapper in (SetLatency(Bound(), 0.0), Retrying(Bound())):
        assert wrapper.bound(query, query, found) == 7.0
    for wrapper in (SetLatency(FakeRetriever(), 0.0), Retrying(FakeRetriever())):
        assert wrapper.bound(query, query, found) == math.inf


# The cache ------------------------------------------------------------------------------------------------------


def remembering(retriever: FakeRetriever, query: Query, k: int, capacity: int = 100) -> SessionCache:
    """A cache that has seen one search."""
    cache = SessionCache(retriever, capacity)
    (found,) = retriever.search([query], k)
    cache.searched(query, found)
    cache.insert(found.ids, retriever.rows(found.ids))
    return cache


def asked(retriever: FakeRetriever, text: str) -> Query:
    (query,) = retriever.encode([Query(text=text)])
    return query


WORLD = Certifying(documents=60, dimension=8, spread=5)
Q = asked(WORLD, "3 1 4 1 5 9 2 6")


def test_a_query_asked_again_is_certain() -> None:
    ranking, certain = remembering(WORLD, Q, 5).certified(Q)
    assert certain and ranking is not None and ranking.ids[0] == WORLD.search([Q], 1)[0].ids[0]


def test_a_tie_with_what_was_left_out_is_not_certain() -> None:
    tied = Certifying(documents=9, spread=1)
    query = asked(tied, "1 2 3")
    assert not remembering(tied, query, 3).certified(query)[1]


def test_what_was_found_must_be_here_all_of_it() -> None:
    cache = SessionCache(WORLD)
    (found,) = WORLD.search([Q], 5)
    cache.searched(Q, found)
    assert cache.certified(Q) == (None, False), "an empty cache"
    cache.insert(found.ids[1:], WORLD.rows(found.ids[1:]))
    assert not cache.certified(Q)[1], "the best is missing, and the bound does not speak of it"
    cache.insert(found.ids[:1], WORLD.rows(found.ids[:1]))
    assert cache.certified(Q)[1]


def test_what_was_evicted_is_not_here_any_more() -> None:
    cache = remembering(WORLD, Q, 5, capacity=5)
    assert cache.certified(Q)[1]
    other = np.setdiff1d(np.arange(60), WORLD.search([Q], 5)[0].ids)[:1]
    cache.insert(other, WORLD.rows(other))
    assert not cache.certified(Q)[1]


def test_fewer_documents_than_wanted_are_not_certain() -> None:
    one = Certifying(documents=1)
    cache = remembering(one, asked(one, "1"), 1)
    assert cache.certified(asked(one, "2"))[1]
    assert not cache.certified(asked(one, "2"), 2)[1]


def test_without_a_bound_nothing_is_certain() -> None:
    plain = FakeRetriever(documents=60, dimension=8, spread=5)
    ranking, certain = remembering(plain, Q, 60).certified(Q)
    assert ranking is not None and not certain


def test_the_last_eight_searches_are_remembered() -> None:
    seen = list[Query]()

    class Noting(Certifying):
        def bound(self, query: Query, past: Query, found: Ranking) -> float:
            seen.append(past)
            return math.inf

    cache = remembering(noting := Noting(documents=60, dimension=8), Q, 3)
    later = [asked(noting, str(n)) for n in range(8)]
    for query in later:
        cache.searched(query, noting.search([query], 3)[0])
    cache.certified(Q)
    assert seen == later[::-1], "the newest first, and the ninth not at all"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("k", [3, 10, 30])
def test_what_is_certain_is_what_the_index_finds(n: int, k: int) -> None:
    """Queries that drift, word by word; ties are frequent."""
    random, words, found_certain = np.random.default_rng(k), list(range(12)), 0
    cache = SessionCache(WORLD, capacity=45)
    for _ in range(300):
        query = asked(WORLD, " ".join(map(str, words)))
        ranking, certain = cache.certified(query, n)
        if certain:
            assert ranking is not None
            assert ranking.ids.tolist() == WORLD.search([query], n)[0].ids.tolist()
            found_certain += 1
        elif random.random() < 0.5:
            (found,) = WORLD.search([query], k)
            cache.searched(query, found)
            cache.insert(found.ids, WORLD.rows(found.ids))
        words[random.integers(len(words))] = int(random.integers(8))
    assert found_certain > 5


def test_threads_that_fill_and_empty_the_cache_make_no_proof_wrong() -> None:
    """One takes in what searches find, more than there is room for, while another asks for proofs."""
    cache, stop, proven = SessionCache(WORLD, capacity=12), threading.Event(), list[tuple[Query, Ranking]]()
    random = np.random.default_rng(5)
    queries = [asked(WORLD, " ".join(map(str, random.integers(0, 8, 12)))) for _ in range(40)]

    def fill() -> None:
        draw = np.random.default_rng(6)
        while not stop.is_set():
            query = queries[draw.integers(len(queries))]
            (found,) = WORLD.search([query], 4)
            cache.insert(found.ids[:1], WORLD.rows(found.ids[:1]))
            cache.searched(query, found)
            cache.insert(found.ids[1:], WORLD.rows(found.ids[1:]))

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        for turn in range(3000):
            ranking, certain = cache.certified(query := queries[turn % len(queries)])
            if certain and ranking is not None:
                proven.append((query, ranking))
    finally:
        stop.set()
        filler.join()
    assert proven
    for query, ranking in proven:
        assert ranking.ids[0] == WORLD.search([query], 1)[0].ids[0]


# The session ----------------------------------------------------------------------------------------------------


def look(hand: Hand, document: int, *, certified: bool = True) -> None:
    guess = Ranking(np.array([document]), np.zeros(1, dtype=np.float32))
    hand.session.looked(hand.session.epoch, hand.ask(), guess, seconds=0.0, certified=certified)


EAGER = Eager(window=8, flights=3)


def test_it_has_no_check_and_is_certain() -> None:
    hand = Hand(Synchronous(certified_skip=True))
    hand.begin()
    hand.decode(1, 2)
    look(hand, 6)
    assert not hand.session.checks.queued and not hand.session.checks_due
    assert hand.session.transcript.steps[-1].certain and not hand.session.drafts
    hand.decode(3, 4)
    assert hand.committed() == [(1, 2), (3, 4)]
    statistics = hand.session.statistics
    assert (statistics.certified, statistics.checked, statistics.kb_queries, statistics.gamma) == (1, 0, 1, 1.0)


def test_a_proof_holds_for_its_context_only() -> None:
    """The step before it is a guess: while that is not judged, neither is anything behind it final."""
    hand = Hand(EAGER)
    hand.begin()
    hand.guesses(5)
    hand.decode(1, 2)
    hand.look()
    hand.decode(3, 4)
    look(hand, 6)
    assert hand.session.drafts and not hand.session.transcript.steps[-1].certain
    hand.decode(5, 6)
    assert hand.committed() == [(1, 2)]
    hand.judge(hand.launch(), 5)
    assert hand.committed() == [(1, 2), (3, 4), (5, 6)]
    assert hand.session.statistics.certified == 1


def test_it_is_rolled_back_with_its_context() -> None:
    hand = Hand(EAGER)
    hand.begin()
    hand.guesses(5)
    hand.decode(1, 2)
    hand.look()
    hand.decode(3, 4)
    look(hand, 6)
    hand.decode(5)
    hand.judge(hand.launch(), 9)
    assert len(hand.session.transcript.steps) == 1 and hand.session.transcript.context[-2:] == [1, 2]
    assert hand.session.statistics.certified == 0, "what is taken back was not saved a check"
    hand.decode(7, 8)
    assert hand.committed() == [(1, 2), (7, 8)]


def test_verdicts_behind_it_wait_for_those_before_it() -> None:
    hand = Hand(EAGER)
    hand.begin()
    hand.guesses(5, 7)
    hand.decode(1, 2)
    hand.look()
    first = hand.launch()
    hand.decode(3, 4)
    look(hand, 6)
    hand.decode(5, 6)
    hand.look()
    hand.decode(7, 8)
    hand.judge(hand.launch(), 7)
    assert hand.committed() == [(1, 2)]
    hand.judge(first, 5)
    assert hand.committed() == [(1, 2), (3, 4), (5, 6), (7, 8)]


def test_a_doubt_that_is_resolved_lets_it_stand() -> None:
    hand = Hand(Eager(window=8, flights=3, token_check=True))
    hand.begin()
    hand.guesses(5)
    hand.decode(1, 2)
    hand.look()
    hand.decode(3, 4)
    look(hand, 6)
    hand.decode(5, 6)
    hand.judge(hand.launch(), 9)
    made = hand.session.next_pass()
    assert made is not None and made.proposed == (3,)
    assert hand.committed() == [(1, 2)]
    hand.session.decoded(made, Decoded((3, 4), None), seconds=0.0)
    assert hand.committed() == [(1, 2), (3, 4), (5, 6)]


def test_one_that_could_not_be_decoded_is_tried_again_when_its_context_is_certain() -> None:
    hand = Hand(EAGER)
    hand.begin()
    hand.guesses(5)
    hand.decode(1, 2)
    hand.look()
    hand.decode(3, 4)
    look(hand, 6)
    made = hand.session.next_pass()
    assert made is not None and hand.session.give_up_draft(made) and hand.session.move is None
    hand.judge(hand.launch(), 5)
    made = hand.session.next_pass()
    assert made is not None and not hand.session.give_up_draft(made), "a fault under what is right is one"
    hand.decode(5, 6)
    assert hand.committed() == [(1, 2), (3, 4), (5, 6)]


# In a pipeline --------------------------------------------------------------------------------------------------


def served(retriever: Any, speculation: Speculation, drafter: Any = None) -> Answer:
    """In virtual time: a search takes a second, a token a tenth."""
    model = FakeModel(ends=False)

    async def main() -> Answer:
        async with Pipeline(
            model=model,
            retriever=retriever,
            drafter=drafter,
            speculation=speculation,
            worker=fixed(model=0.1, index=1.0),
        ) as pipeline:
            return await pipeline.complete(PROMPT, max_new_tokens=40)

    answer = run(main)
    expected = sequential(model, retriever, model.encode(PROMPT), max_new_tokens=40)
    assert (list(answer.tokens), [step.document.id for step in answer.steps]) == expected
    return answer


def small(kind: type[FakeRetriever]) -> FakeRetriever:
    return kind(documents=50, dimension=8, spread=5)


def test_the_index_is_asked_less() -> None:
    """All documents come with the first search, and nothing was left out."""
    without = served(small(Certifying), Synchronous(speculation_stride=2, prefetch=50)).statistics
    proven = served(small(Certifying), Synchronous(speculation_stride=2, prefetch=50, certified_skip=True)).statistics
    assert proven.certified == proven.steps - 1 and proven.kb_queries == 1
    assert without.certified == 0 and without.kb_queries == without.steps
    assert proven.latency_s == pytest.approx(1.0 + 40 * 0.1)


def test_a_drafter_is_not_asked_about_what_is_certain() -> None:
    retriever = small(Certifying)
    drafter = Guessing(retriever)
    statistics = served(retriever, Continuous(prefetch=50), drafter).statistics
    assert statistics.certified and len(drafter.asked) < statistics.steps + statistics.rollbacks


def test_what_does_not_skip_asks_for_everything() -> None:
    for speculation in (Sequential(), *published(50).values(), Continuous(prefetch=50, certified_skip=False)):
        assert served(small(Certifying), speculation).statistics.certified == 0


def test_without_a_bound_everything_is_checked() -> None:
    assert served(small(FakeRetriever), Continuous(prefetch=50)).statistics.certified == 0
