"""A guess that an earlier search proves needs no check: what the cache, the session and the pipeline make of a bound.

The bound itself is tested in `test_drift.py`; the oracle tests of every arrangement are in `test_same_output*.py`,
random schedules in `test_schedules.py`.
"""

import math
import sys
import threading
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from clocks import run
from fakes import Certifying, FakeModel, FakeRetriever, Guessing, fixed
from hand import Hand
from oracle import sequential
from simulation import Eager

from ralmspec.pipeline import Answer, Continuous, Pipeline, Sequential, Speculation, Synchronous, published
from ralmspec.retrievers.base import Query, Ranking
from ralmspec.retrievers.cache import SessionCache
from ralmspec.stages.messages import Decoded

PROMPT = "3 1 4 1 5"


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

    filler, interval = threading.Thread(target=fill), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # or one of them may have the interpreter to itself for long
    filler.start()
    try:
        for query in cycle(queries):
            ranking, certain = cache.certified(query)
            if certain and ranking is not None:
                proven.append((query, ranking))
            if len(proven) == 300:
                break
    finally:
        stop.set()
        filler.join()
        sys.setswitchinterval(interval)
    for query, ranking in proven:
        assert ranking.ids[0] == WORLD.search([query], 1)[0].ids[0]


# The session ----------------------------------------------------------------------------------------------------


def look(hand: Hand, document: int) -> None:
    """The next step begins, its document certified."""
    guess = Ranking(np.array([document]), np.zeros(1, dtype=np.float32))
    hand.session.looked(hand.session.epoch, hand.ask(), guess, seconds=0.0, certified=True)


def behind_a_guess(*, token_check: bool = False) -> Hand:
    """The second step is written under a guess, which is not judged; the third is certified, and has no token yet."""
    hand = Hand(Eager(window=8, flights=3, token_check=token_check))
    hand.begin()
    hand.guesses(5)
    hand.decode(1, 2)
    hand.look()
    hand.decode(3, 4)
    look(hand, 6)
    return hand


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
    hand = behind_a_guess()
    assert hand.session.drafts and not hand.session.transcript.steps[-1].certain
    hand.decode(5, 6)
    assert hand.committed() == [(1, 2)]
    hand.judge(hand.launch(), 5)
    assert hand.committed() == [(1, 2), (3, 4), (5, 6)]
    assert hand.session.statistics.certified == 1


def test_it_is_rolled_back_with_its_context() -> None:
    hand = behind_a_guess()
    hand.decode(5)
    hand.judge(hand.launch(), 9)
    assert len(hand.session.transcript.steps) == 1 and hand.session.transcript.context[-2:] == [1, 2]
    assert hand.session.statistics.certified == 0, "what is taken back was not saved a check"
    hand.decode(7, 8)
    assert hand.committed() == [(1, 2), (7, 8)]


def test_verdicts_behind_it_wait_for_those_before_it() -> None:
    hand = Hand(Eager(window=8, flights=3))
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
    hand = behind_a_guess(token_check=True)
    hand.decode(5, 6)
    hand.judge(hand.launch(), 9)
    made = hand.session.next_pass()
    assert made is not None and made.proposed == (3,)
    assert hand.committed() == [(1, 2)]
    hand.session.decoded(made, Decoded((3, 4), None), seconds=0.0)
    assert hand.committed() == [(1, 2), (3, 4), (5, 6)]


def test_one_that_could_not_be_decoded_is_tried_again_when_its_context_is_certain() -> None:
    hand = behind_a_guess()
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
