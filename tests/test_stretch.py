"""A session is looked back upon after every stretch of steps, and may be served otherwise from there on."""

from typing import Any

import pytest
from clocks import run
from fakes import END, Certifying, FakeModel, FakeRetriever, fixed
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
from ralmspec.stages.messages import Decoded
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
    assert stretches.committed(after(1, 10.0), MANY) is None
    assert [stretches.committed(after(steps, 10.0 + steps), MANY) for steps in range(2, 17)] == [None] * 15
    taken = stretches.committed(after(17, 42.0), MANY)
    assert taken is not None and (taken.steps, taken.latency_s) == (16, 32.0)
    assert stretches.committed(after(32, 50.0), MANY) is None
    taken = stretches.committed(after(40, 62.0), MANY)
    assert taken is not None and (taken.steps, taken.latency_s) == (23, 20.0), "many steps may be committed at once"


def test_what_was_begun_before_a_change_belongs_to_no_stretch_nor_the_first_step_after_it() -> None:
    stretches = told()
    stretches.restart(20)  # three steps are still open
    assert stretches.committed(after(20, 30.0), MANY) is None
    assert stretches.committed(after(21, 40.0), MANY) is None, "from here on"
    assert stretches.committed(after(36, 71.0), MANY) is None
    taken = stretches.committed(after(37, 72.0), MANY)
    assert taken is not None and (taken.steps, taken.latency_s) == (16, 32.0)


def test_where_too_few_steps_are_left_for_another_a_stretch_goes_on_to_the_end() -> None:
    stretches = Stretches()
    stretches.committed(after(1, 1.0), 31)
    assert stretches.committed(after(17, 17.0), 7) is None
    rest = stretches.rest(after(32, 50.0), cut_short=False)
    assert rest is not None and (rest.steps, rest.latency_s) == (31, 49.0), "the last verification included"


def test_the_rest_counts_if_it_is_half_a_stretch() -> None:
    stretches = told()
    assert stretches.rest(after(24, 30.0), cut_short=False) is None
    rest = stretches.rest(after(25, 30.0), cut_short=False)
    assert rest is not None and (rest.steps, rest.latency_s) == (8, 13.0)


def test_of_a_short_session_all_of_it_counts() -> None:
    stretches = Stretches()
    assert stretches.rest(after(0, 3.0), cut_short=True) == after(0, 3.0)
    stretches.committed(after(1, 1.0), MANY)
    assert stretches.rest(after(5, 9.0), cut_short=False) == after(5, 9.0)
    stretches = told()
    stretches.restart(40)
    assert stretches.rest(after(30, 50.0), cut_short=False) is None, "something of it has been told"


def test_of_one_that_took_too_long_a_few_steps_count_or_none() -> None:
    stretches = told()
    rest = stretches.rest(after(19, 90.0), cut_short=True)
    assert rest is not None and (rest.steps, rest.latency_s) == (2, 73.0)
    stretches.restart(20)
    rest = stretches.rest(after(20, 90.0), cut_short=True)
    assert rest is not None and rest.steps == 0, "nothing that was begun since the change"


MANY = 1000  # steps that are left


def told() -> Stretches:
    """One stretch is complete, of seventeen steps that took as many seconds."""
    stretches = Stretches()
    stretches.committed(after(1, 1.0), MANY)
    assert stretches.committed(after(17, 17.0), MANY) is not None
    return stretches


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
def test_what_was_drafted_before_a_change_stands_and_no_more_is_drafted() -> None:
    asked = Asked(Sequential())
    hand = Hand(CONTINUOUS, reconsider=asked)
    hand.play((1, 2), (3, 4), (5, 6), guesses=(5, 6, 7))
    hand.judge(hand.launch(), 5, 6, 7)
    assert asked.told == [(CONTINUOUS, 2)] and isinstance(hand.session.arrangement, Sequential)
    hand.decode(7, 8)
    assert hand.committed() == [(1, 2), (3, 4), (5, 6), (7, 8)]
    hand.session.looked(hand.session.epoch, hand.ask(), None, seconds=0.0)
    (check,) = hand.launch()
    assert check.cache is None and check.documents == 1, "nothing is cached for guesses that are not made"
    assert hand.session.move is None


@pytest.mark.usefixtures("short_stretches")
def test_an_open_draft_waits_for_its_verdict_where_nothing_is_drafted_any_more() -> None:
    hand = Hand(CONTINUOUS, reconsider=Asked(Sequential()))
    hand.play((1, 2), (3, 4), guesses=(5, 6, 7))
    first = hand.launch()
    hand.decode(5, 6)
    hand.look()
    hand.decode(7)
    assert hand.session.move is Move.DECODE
    hand.judge(first, 5, 6)
    assert isinstance(hand.session.arrangement, Sequential) and hand.session.move is None
    hand.judge(hand.launch(), 7)
    hand.decode(8)
    assert hand.committed()[-1] == (7, 8)


@pytest.mark.usefixtures("short_stretches")
def test_credits_are_those_of_the_largest_window() -> None:
    """One batch brings all home that was drafted before the change."""
    hand = Hand(CONTINUOUS, reconsider=Asked(Sequential()), window=64)
    hand.play((1, 2), (3, 4), guesses=(5, 6, 7, 8, 9, 10))
    first = hand.launch()
    for tokens in ((5, 6), (7, 8), (9, 10), (11, 12)):
        hand.decode(*tokens)
        hand.look()
    hand.judge(first, 5, 6)
    assert isinstance(hand.session.arrangement, Sequential)
    assert hand.session.move is None, "four steps are open, and one at most may be"
    assert len(hand.launch()) == 4


@pytest.mark.usefixtures("short_stretches")
def test_a_doubt_outlives_a_change() -> None:
    """Of two batches the second comes when the session is served otherwise; its wrong guess was doubted before."""
    hand = Hand(Continuous(certified_skip=False, flights=2), reconsider=Asked(Sequential()))
    hand.play((1, 2), (3, 4), (5, 6), guesses=(5, 6, 7, 8))
    checks = hand.launch()
    hand.decode(7, 8)
    hand.judge(checks, 5, 6, 9)
    assert isinstance(hand.session.arrangement, Sequential)
    made = hand.session.next_pass()
    assert made is not None and made.proposed == (7,), "the token check of the open step"
    hand.session.decoded(made, Decoded((7, 8), None), seconds=0.0)
    assert hand.committed()[-1] == (7, 8) and hand.session.statistics.saved == 1


@pytest.mark.usefixtures("short_stretches")
def test_a_stride_that_is_taken_up_again_goes_on_where_it_was() -> None:
    synchronous = Synchronous(speculation_stride=1)
    hand = Hand(synchronous, reconsider=Asked(Sequential(), synchronous), window=8)
    pace = hand.session.pace
    hand.begin()
    hand.guesses(5, 5)
    hand.decode(1, 2)
    for n in range(2):
        hand.look()
        hand.judge(hand.launch(), 5)
        hand.decode(2 * n, 3)
    assert isinstance(hand.session.arrangement, Sequential) and hand.session.pace is not pace
    while hand.session.pace is not pace:
        hand.session.looked(hand.session.epoch, hand.ask(), None, seconds=0.0)
        hand.judge(hand.launch(), 5)
        hand.decode(5, 6)
    assert hand.session.pace is pace


@pytest.mark.usefixtures("short_stretches")
def test_what_was_open_at_a_change_is_not_held_against_what_serves_then() -> None:
    """Three steps are committed and the fourth is open; the fifth is the first that is begun in the new arrangement."""
    asked = Asked(sequential_serving := Sequential(), sequential_serving)
    hand = Hand(CONTINUOUS, reconsider=asked)
    hand.play((1, 2), (3, 4), (5, 6), guesses=(5, 6, 7))
    hand.judge(hand.launch(), 5, 6, 7)
    hand.decode(7, 8)
    for committed in (5, 6, 7):
        assert len(asked.told) == 1
        hand.session.looked(hand.session.epoch, hand.ask(), None, seconds=0.0)
        hand.judge(hand.launch(), 5)
        hand.decode(5, 6)
        assert len(hand.committed()) == committed
    assert asked.told[1] == (sequential_serving, 2)


@pytest.mark.usefixtures("short_stretches")
def test_an_end_that_is_drafted_is_the_end_of_the_last_stretch() -> None:
    hand = Hand(CONTINUOUS, reconsider=Asked(), model=FakeModel())
    hand.play((1, 2), (3, 4), guesses=(5, 6, 7))
    first = hand.launch()
    hand.decode(5, 6)
    hand.look()
    hand.decode(END)
    hand.judge(first, 5, 6)
    assert len(hand.committed()) == 3 and not hand.session.final, "nobody was asked what should come then"


@pytest.mark.usefixtures("short_stretches")
def test_the_time_a_reader_took_is_told() -> None:
    away = list[float]()

    def note(arrangement: Arrangement, taken: Statistics) -> Arrangement:
        away.append(taken.reader_s)
        return arrangement

    hand = Hand(Sequential(), reconsider=note, unread_limit=2)
    for committed in (1, 2, 3):
        hand.session.looked(hand.session.epoch, hand.ask(), None, seconds=0.0)
        hand.judge(hand.launch(), 5)
        hand.decode(1, 2)
        if committed == 2:
            assert hand.session.move is None
            hand.at = 10.0
            hand.session.reader.heard()
            hand.session.reader.heard()
    assert away == [10.0]


@pytest.mark.usefixtures("short_stretches")
def test_the_end_is_no_time_for_a_change() -> None:
    hand = Hand(CONTINUOUS, reconsider=Asked(), max_new_tokens=6)
    hand.play((1, 2), (3, 4), guesses=(5, 6))
    hand.decode(5, 6)
    hand.judge(hand.launch(), 5, 6)
    assert hand.session.final, "nobody was asked"


# In a pipeline ---------------------------------------------------------------------------------------------------


def served(
    speculation: Speculation, tokens: int, seconds: dict[str, float], retriever: FakeRetriever | None = None
) -> Answer:
    """In virtual time, as sequential serving would have it."""
    model, retriever = FakeModel(ends=False), retriever or FakeRetriever(documents=300, dimension=8, spread=5)

    async def main() -> Answer:
        async with Pipeline(
            model=model,
            retriever=retriever,
            workload=InContext(),
            speculation=speculation,
            worker=fixed(**seconds),
        ) as pipeline:
            return await pipeline.complete("3 1 4", max_new_tokens=tokens)

    answer = run(main)
    expected = sequential(model, retriever, model.encode("3 1 4"), max_new_tokens=tokens)
    assert (list(answer.tokens), [step.document.id for step in answer.steps]) == expected
    return answer


def test_a_session_that_is_served_badly_does_not_go_on_so() -> None:
    """Every step waits for a search; the other choice does not."""
    slow = Synchronous(speculation_stride=1, prefetch=1)
    adaptive = Adaptive((slow, Continuous(prefetch=256)))
    workers = {"model": 0.1, "index": 8.0}
    worst = served(slow, 400, workers).statistics.latency_s
    best = served(Continuous(prefetch=256), 400, workers).statistics.latency_s
    assert served(adaptive, 400, workers).statistics.latency_s < best + (worst - best) / 4


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
    retriever = Certifying(documents=300, dimension=8, spread=5)
    served(turns, 600, {"model": 0.1, "index": b, "encoder": 0.02}, retriever)
    assert len({arrangement for arrangement, _ in turns.learned}) == 4
    assert all(steps >= 16 for _, steps in turns.learned[:-1])
