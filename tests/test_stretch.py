"""A session is looked back upon after every stretch of steps, and may be served otherwise from there on."""

from typing import Any

import pytest
from clocks import run
from fakes import Certifying, FakeModel, FakeRetriever, fixed
from hand import Hand
from oracle import sequential

from ralmspec.pipeline import (
    Adaptive,
    Answer,
    Arrangement,
    Continuous,
    InContext,
    Pipeline,
    Sequential,
    Speculation,
    Statistics,
    Synchronous,
)
from ralmspec.stages import stretch
from ralmspec.stages.request import Request
from ralmspec.stages.step import Move
from ralmspec.stages.stretch import Stretches


def after(steps: int, seconds: float, **more: Any) -> Statistics:
    """As a session's statistics stand after so many steps."""
    return Statistics(steps=steps, latency_s=seconds, **more)


# Stretches -------------------------------------------------------------------------------------------------------


def test_what_is_no_sum_is_not_subtracted() -> None:
    early = Statistics(prompt_tokens=5, steps=3, search_s=1.0, shortest_search_s=0.25, time_to_first_token_s=2.0)
    late = Statistics(
        prompt_tokens=5, steps=10, search_s=4.0, shortest_search_s=0.125, time_to_first_token_s=2.0, rollbacks=2
    )
    assert late.since(early) == Statistics(
        prompt_tokens=5, steps=7, search_s=3.0, shortest_search_s=0.125, time_to_first_token_s=2.0, rollbacks=2
    )


def test_a_stretch_is_sixteen_steps_and_the_first_step_belongs_to_none() -> None:
    stretches = Stretches()
    assert stretches.committed(after(1, 10.0)) is None
    assert [stretches.committed(after(steps, 10.0 + steps)) for steps in range(2, 17)] == [None] * 15
    taken = stretches.committed(after(17, 42.0))
    assert taken is not None and (taken.steps, taken.latency_s) == (16, 32.0)
    assert stretches.committed(after(32, 50.0)) is None
    taken = stretches.committed(after(40, 62.0))
    assert taken is not None and (taken.steps, taken.latency_s) == (23, 20.0), "many steps may be committed at once"


def test_what_was_begun_before_a_change_belongs_to_no_stretch() -> None:
    stretches = Stretches()
    stretches.committed(after(1, 1.0))
    stretches.committed(after(17, 17.0))
    stretches.restart(20, after(17, 17.0))  # three steps are still open
    assert stretches.committed(after(19, 30.0)) is None
    assert stretches.committed(after(21, 40.0)) is None, "from here on"
    taken = stretches.committed(after(37, 72.0))
    assert taken is not None and (taken.steps, taken.latency_s) == (16, 32.0)


def test_with_nothing_open_the_next_stretch_begins_at_once() -> None:
    stretches = Stretches()
    stretches.committed(after(1, 1.0))
    stretches.restart(1, after(1, 1.0))
    taken = stretches.committed(after(17, 9.0))
    assert taken is not None and (taken.steps, taken.latency_s) == (16, 8.0)


def test_the_rest_counts_if_it_is_half_a_stretch() -> None:
    stretches = Stretches()
    stretches.committed(after(1, 1.0))
    stretches.committed(after(17, 17.0))
    assert stretches.rest(after(24, 30.0)) is None
    rest = stretches.rest(after(25, 30.0))
    assert rest is not None and (rest.steps, rest.latency_s) == (8, 13.0)


def test_of_a_short_session_all_of_it_counts() -> None:
    stretches = Stretches()
    assert stretches.rest(after(0, 3.0)) == after(0, 3.0), "it missed its deadline with nothing"
    stretches.committed(after(1, 1.0))
    assert stretches.rest(after(5, 9.0)) == after(5, 9.0)
    stretches.committed(after(17, 17.0))
    stretches.restart(40, after(17, 17.0))
    assert stretches.rest(after(30, 50.0)) is None, "something of it has been told"


# The session -----------------------------------------------------------------------------------------------------


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretch, "STEPS", 2)


class Asked:
    """Says what to do next, and what it has been told."""

    def __init__(self, *then: Arrangement) -> None:
        self.then = list(then)
        self.told: list[tuple[Arrangement, int]] = []

    def __call__(self, arrangement: Arrangement, taken: Statistics) -> Arrangement:
        self.told.append((arrangement, taken.steps))
        return self.then.pop(0)


CONTINUOUS = Continuous(certified_skip=False)


@pytest.mark.usefixtures("short_stretches")
def test_drafts_that_are_out_at_a_change_are_verified_and_no_more_are_made() -> None:
    asked = Asked(served := Sequential(), served)
    hand = Hand(CONTINUOUS, reconsider=asked)
    hand.play((1, 2), (3, 4), (5, 6), guesses=(5, 6, 7))
    first = hand.launch()  # of the second step; those of the third and of what comes next wait
    assert hand.committed() == [(1, 2)]
    hand.decode(7)
    hand.judge(first, 5)
    hand.judge(hand.launch(), 6, 7) if hand.session.checks.queued else None
    assert asked.told == [(CONTINUOUS, 2)] and hand.session.arrangement is served
    assert hand.session.move is Move.DECODE, "its document is known by now"
    hand.decode(8)
    assert hand.committed() == [(1, 2), (3, 4), (5, 6), (7, 8)]
    query = hand.ask()
    hand.session.looked(hand.session.epoch, query, None, seconds=0.0)
    (check,) = hand.launch()
    assert check.cache is None and check.documents == 1, "nothing is cached for guesses that are not made"
    assert hand.session.move is None


@pytest.mark.usefixtures("short_stretches")
def test_an_open_draft_waits_for_its_verdict_where_nothing_is_drafted_any_more() -> None:
    hand = Hand(CONTINUOUS, reconsider=Asked(Sequential()))
    hand.play((1, 2), (3, 4), (5, 6), guesses=(5, 6, 7))
    hand.decode(7)
    hand.judge(hand.launch(), 5, 6, 7)
    assert isinstance(hand.session.arrangement, Sequential) and hand.session.move is Move.DECODE
    hand = Hand(CONTINUOUS, reconsider=Asked(Sequential()))
    hand.play((1, 2), guesses=(5, 6, 7))
    first = hand.launch()
    hand.decode(3, 4)
    hand.look()
    hand.decode(5, 6)
    hand.look()
    hand.decode(7)
    hand.judge(first, 5)
    assert hand.session.move is Move.DECODE, "two steps since the first are not committed yet"


@pytest.mark.usefixtures("short_stretches")
def test_credits_are_those_of_the_largest_window() -> None:
    """One batch brings all home that was drafted before the change."""
    hand = Hand(CONTINUOUS, reconsider=Asked(Sequential()), window=64)
    hand.begin()
    hand.guesses(*range(5, 12))
    hand.decode(1, 2)
    hand.look()
    hand.decode(3, 4)
    hand.look()
    first = hand.launch()
    for tokens in ((5, 6), (7, 8), (9, 10), (11, 12)):
        hand.decode(*tokens)
        hand.look()
    hand.judge(first, 5, 6)
    hand.decode(13, 14)
    assert len(hand.committed()) == 3 and isinstance(hand.session.arrangement, Sequential)
    assert hand.session.move is None, "five steps are open, and one at most may be"
    assert len(hand.launch()) == 4


# In a pipeline ---------------------------------------------------------------------------------------------------


def served(
    speculation: Speculation, tokens: int, *, retriever: FakeRetriever | None = None, **workers: float
) -> Answer:
    """In virtual time, as sequential serving would have it."""
    model, retriever = FakeModel(ends=False), retriever or FakeRetriever(documents=300, dimension=8, spread=5)

    async def main() -> Answer:
        async with Pipeline(
            model=model,
            retriever=retriever,
            workload=InContext(),
            speculation=speculation,
            worker=fixed(**workers),
        ) as pipeline:
            return await pipeline.complete("3 1 4", max_new_tokens=tokens)

    answer = run(main)
    expected = sequential(model, retriever, model.encode("3 1 4"), max_new_tokens=tokens)
    assert (list(answer.tokens), [step.document.id for step in answer.steps]) == expected
    return answer


def test_a_session_that_is_served_badly_does_not_go_on_so() -> None:
    """Nothing is ever sent out before the window is full, and a search takes a moment: the other choice is better."""
    slow = Synchronous(speculation_stride=1, prefetch=1)
    adaptive = Adaptive((slow, Continuous(prefetch=256)))
    workers = {"model": 0.1, "index": 8.0}
    worst = served(slow, 400, **workers).statistics.latency_s
    best = served(Continuous(prefetch=256), 400, **workers).statistics.latency_s
    assert served(adaptive, 400, **workers).statistics.latency_s < best + (worst - best) / 4


class Turns:
    """Every stretch in the next of these; one round after the other."""

    def __init__(self, *arrangements: Arrangement) -> None:
        self.window = max(arrangement.window for arrangement in arrangements)
        self.flights = max(arrangement.flights for arrangement in arrangements)
        self._arrangements = arrangements
        self.learned: list[tuple[Arrangement, int]] = []

    def choose(self, request: Request) -> Arrangement:
        return self._arrangements[len(self.learned) % len(self._arrangements)]

    def learn(self, request: Request, arrangement: Arrangement, statistics: Statistics) -> None:
        self.learned.append((arrangement, statistics.steps))


@pytest.mark.parametrize("b", [0.01, 0.5, 8.0])
def test_outputs_do_not_depend_on_when_it_changes(b: float) -> None:
    arrangements = Continuous(prefetch=20), Sequential(), Synchronous(speculation_stride=3), Continuous(flights=3)
    turns = Turns(*arrangements)
    served(turns, 600, retriever=Certifying(documents=300, dimension=8, spread=5), model=0.1, index=b, encoder=0.02)
    assert len({arrangement for arrangement, _ in turns.learned}) == 4
    assert all(steps >= 16 for _, steps in turns.learned[:-1])
