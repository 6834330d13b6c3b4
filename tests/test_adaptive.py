"""Which arrangement a pipeline serves its next session in, from what the last ones took."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import anyio
import pytest
from clocks import VirtualLoop
from fakes import FakeModel, FakeRetriever, fixed

from ralmspec.pipeline import (
    Adaptive,
    Answer,
    Arrangement,
    Continuous,
    DeadlineExceeded,
    Done,
    InContext,
    Limits,
    Pipeline,
    RetrieverFailed,
    Sequential,
    Speculation,
    Stalled,
    Statistics,
    Synchronous,
)
from ralmspec.stages.arrangement import Outlook
from ralmspec.stages.request import Request


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


REQUEST = Request(prompt=(1,), max_new_tokens=128)


@dataclass
class World:
    """Seconds that a step takes in each kind of arrangement; a and b of the machine."""

    seconds: dict[type[Any], float]
    a: float
    b: float
    queries: int = 1  # in a search, unless the session is served sequentially

    def statistics(self, arrangement: Arrangement) -> Statistics:
        queries = self.queries if arrangement.guesses else 1
        return Statistics(
            steps=40,
            kb_calls=40 // queries,
            kb_queries=40 // queries * queries,
            latency_s=40 * self.seconds[type(arrangement)],
            busy_s=40 * self.a,
            search_s=40 // queries * queries * self.b,
            shortest_search_s=self.b,
        )


def played(adaptive: Adaptive, world: Callable[[int], World], sessions: int) -> list[type[Any]]:
    """One session after the other."""
    chosen = []
    for number in range(sessions):
        arrangement = adaptive.choose(REQUEST)
        chosen.append(type(arrangement))
        adaptive.learn(REQUEST, arrangement, world(number).statistics(arrangement))
    return chosen


FREE = World({Continuous: 1.2, Synchronous: 1.1, Sequential: 1.0}, a=1.0, b=0.05)
"""Searching costs next to nothing: guessing only takes time."""
SHARED = World({Continuous: 4.0, Synchronous: 2.0, Sequential: 3.0}, a=1.5, b=2.0)
"""Searches slow the model down: they had better not run at the same time."""
OWN = World({Continuous: 1.3, Synchronous: 2.2, Sequential: 21.0}, a=1.0, b=20.0)
"""The index has resources of its own."""


@pytest.mark.parametrize(
    ("world", "best"), [(FREE, Sequential), (SHARED, Synchronous), (OWN, Continuous)], ids=["free", "shared", "own"]
)
def test_it_settles_for_what_is_fastest(world: World, best: type[Any]) -> None:
    adaptive = Adaptive()
    chosen = played(adaptive, lambda number: world, 240)
    assert chosen[0] is Continuous, "nothing is known yet"
    assert Counter(chosen[12:])[best] >= 215
    spent = sum(world.seconds[kind] for kind in chosen[12:]) / len(chosen[12:])
    assert spent <= 1.01 * world.seconds[best], "looking again at the second best costs next to nothing"


def test_searches_that_cost_what_their_queries_cost_one_by_one_are_seen_through() -> None:
    """A batch of eight takes eight times one, and guesses are poor: to serve one after the other takes half as long."""
    shared = World({Continuous: 17.0, Synchronous: 15.0, Sequential: 8.0}, a=1.0, b=7.0, queries=8)
    assert Counter(played(Adaptive(), lambda number: shared, 120)[12:])[Sequential] >= 100


def test_what_guessing_costs_besides_is_not_held_against_not_guessing() -> None:
    """KNN-LM on shared cores: beside searches, and with its look-ups, a token takes 17 ms. Alone it takes 6."""
    knn = World({Continuous: 17.3, Synchronous: 23.8, Sequential: 13.0}, a=16.8, b=9.0)
    assert Counter(played(Adaptive(), lambda number: knn, 60)[12:])[Sequential] >= 42


def test_searches_that_take_the_same_for_many_are_not_mistaken_for_cheap_ones() -> None:
    """Shared by three, a search takes as long as for one: one after the other would wait for each."""
    adaptive = Adaptive()
    for _ in range(60):
        chosen = adaptive.choose(REQUEST)
        assert not isinstance(chosen, Sequential)
        taken = World({Continuous: 2.0, Synchronous: 3.0}, a=1.0, b=5.0).statistics(chosen)
        taken.kb_calls, taken.search_s = 13, 13 * 5.0
        adaptive.learn(REQUEST, chosen, taken)


def test_of_those_that_are_as_fast_it_takes_what_works_least() -> None:
    nearly = World({Continuous: 1.0, Synchronous: 1.02, Sequential: 1.04}, a=1.0, b=0.05)
    assert Counter(played(Adaptive(), lambda number: nearly, 120)[12:])[Sequential] >= 100
    more = World({Continuous: 1.0, Synchronous: 1.02, Sequential: 1.06}, a=1.0, b=0.06)
    assert Counter(played(Adaptive(), lambda number: more, 120)[12:])[Synchronous] >= 100


def test_where_there_is_nothing_to_win_nothing_is_tried() -> None:
    """Sixteen sessions keep the model busy: what one takes depends on the others, and not on how it is served."""
    random = Random(0)

    def crowded(number: int) -> World:
        took = random.uniform(0.4, 1.0)  # a step
        return World(dict.fromkeys((Continuous, Synchronous, Sequential), took), a=0.98 * took, b=0.01 * took)

    adaptive = Adaptive()
    adaptive.learn(REQUEST, adaptive.choose(REQUEST), FREE.statistics(Sequential()))
    assert set(played(adaptive, crowded, 120)) == {Sequential}
    chosen = played(adaptive, lambda number: OWN, 60)
    assert Counter(chosen)[Continuous] >= 40, "the others have gone, and there is much to win"


def test_what_once_took_too_long_is_forgiven_with_its_next_result() -> None:
    """The model is busy all the time, so nothing is to win, and what works least serves."""
    busy = World(dict.fromkeys((Continuous, Synchronous, Sequential), 1.0), a=0.98, b=0.01)
    adaptive = Adaptive()
    adaptive.learn(REQUEST, Sequential(), Statistics(latency_s=1.0))
    for arrangement in (Continuous(prefetch=256), Sequential()):
        adaptive.learn(REQUEST, arrangement, busy.statistics(arrangement))
    assert set(played(adaptive, lambda number: busy, 60)) == {Sequential}


def test_what_cannot_win_is_never_tried() -> None:
    """Searches take twenty steps. To wait for one at each step is out of the question, and so is to wait for the four
    that forty steps cannot do without where seventeen at most share one."""
    assert set(played(Adaptive(), lambda number: OWN, 240)) == {Continuous}


def test_it_follows_when_the_world_changes() -> None:
    close = World({Continuous: 1.0, Synchronous: 1.2, Sequential: 9.0}, a=0.9, b=9.0)
    turned = World({Continuous: 3.0, Synchronous: 1.2, Sequential: 9.0}, a=0.9, b=9.0)
    chosen = played(Adaptive(), lambda number: close if number < 60 else turned, 120)
    assert Counter(chosen[20:60])[Continuous] >= 37 and Counter(chosen[70:])[Synchronous] >= 47


def test_it_notices_when_the_second_best_becomes_the_best() -> None:
    close = World({Continuous: 1.0, Synchronous: 1.2, Sequential: 4.7}, a=0.7, b=4.0)
    turned = World({Continuous: 1.0, Synchronous: 0.5, Sequential: 4.7}, a=0.7, b=4.0)
    chosen = played(Adaptive(), lambda number: close if number < 60 else turned, 300)
    assert set(chosen[260:]) == {Synchronous}


def test_one_slow_session_changes_nothing() -> None:
    slow = World({Continuous: 50.0, Synchronous: 2.2, Sequential: 21.0}, a=1.0, b=20.0)
    chosen = played(Adaptive(), lambda number: slow if number == 30 else OWN, 60)
    assert Counter(chosen[31:])[Continuous] >= 27


def test_nothing_else_is_tried_while_nothing_is_known() -> None:
    """Sixty-four sessions begin at once."""
    adaptive = Adaptive()
    assert {type(adaptive.choose(REQUEST)) for _ in range(64)} == {Continuous}
    adaptive.learn(REQUEST, Continuous(prefetch=256), FREE.statistics(Continuous()))
    assert Counter(type(adaptive.choose(REQUEST)) for _ in range(16))[Continuous] >= 12, "one in eight tries something"


def test_what_short_sessions_took_says_nothing_of_long_ones() -> None:
    """Where the last verification is most of the time, not to wait for it gains nothing."""
    adaptive, short = Adaptive(), Request(prompt=(1,), max_new_tokens=16)
    chosen = adaptive.choose(short)
    adaptive.learn(short, chosen, World({Continuous: 6.0}, a=1.0, b=20.0).statistics(chosen))
    assert set(played(adaptive, lambda number: OWN, 9)) == {Continuous}
    assert not isinstance(adaptive.choose(short), Continuous), "of a short one something else may be better"


def test_an_arrangement_of_ones_own_may_be_among_the_choices() -> None:
    choices = (Synchronous(speculation_stride=2), Sequential())
    adaptive = Adaptive(choices)
    assert adaptive.window == 3 and adaptive.flights == 1 and adaptive.choose(REQUEST) is choices[0]


def test_sessions_that_took_no_time_teach_nothing() -> None:
    adaptive = Adaptive()
    adaptive.learn(REQUEST, adaptive.choose(REQUEST), Statistics())
    assert isinstance(adaptive.choose(REQUEST), Continuous)


# Real sessions in virtual time -----------------------------------------------------------------------------------


async def seconds(speculation: Speculation | None, *, b: float, sessions: int = 24) -> list[Answer]:
    async with Pipeline(
        model=FakeModel(ends=False),
        retriever=FakeRetriever(documents=300, dimension=8, spread=5),
        workload=InContext(),
        speculation=speculation,
        worker=fixed(model=0.1, index=b, encoder=0.02),
    ) as pipeline:
        return [await pipeline.complete(f"3 1 {n}", max_new_tokens=40) for n in range(sessions)]


@pytest.mark.parametrize("b", [0.001, 0.4, 8.0])
async def test_it_is_as_fast_as_the_best_after_a_few_sessions(b: float) -> None:
    took = {}
    served: dict[str, Speculation | None] = {
        "sequential": Sequential(),
        "synchronous": Synchronous(speculation_stride=8, token_check=True),
        "continuous": Continuous(prefetch=256),
        "adaptive": None,  # the default
    }
    for name, speculation in served.items():
        answers = await seconds(speculation, b=b)
        took[name] = sum(answer.statistics.latency_s for answer in answers[8:])
    assert took["adaptive"] <= 1.05 * min(took.values())


def test_time_that_a_reader_takes_is_nobodys() -> None:
    adaptive = Adaptive()
    for number in range(40):
        chosen = adaptive.choose(REQUEST)
        statistics = OWN.statistics(chosen)
        if isinstance(chosen, Continuous):
            statistics.reader_s = 1000.0 + number
            statistics.latency_s += statistics.reader_s
        adaptive.learn(REQUEST, chosen, statistics)
    assert isinstance(adaptive.choose(REQUEST), Continuous)


async def test_what_is_read_after_the_end_is_not_waited_for() -> None:
    """All is decoded before the reader looks, once."""
    async with Pipeline(
        model=FakeModel(ends=False),
        retriever=FakeRetriever(documents=300, dimension=8, spread=5),
        workload=InContext(retrieval_stride=4),
        speculation=Sequential(),
        limits=Limits(unread_events=10),
        worker=fixed(model=0.5, index=6.0),
    ) as pipeline:
        async with pipeline.session("3 1", max_new_tokens=40, ignore_eos=True) as session:
            await anyio.sleep(500.0)
            async for event in session:
                statistics = event.statistics if isinstance(event, Done) else None
        assert statistics is not None and statistics.reader_s == 0.0
        assert statistics.latency_s == pytest.approx(80.0)


async def test_how_long_a_session_waits_for_its_reader_is_measured() -> None:
    """Steps of 8 s, an event every 30 s: a session that may leave two of them unread waits for the rest."""
    async with Pipeline(
        model=FakeModel(ends=False),
        retriever=FakeRetriever(documents=300, dimension=8, spread=5),
        workload=InContext(retrieval_stride=4),
        speculation=Sequential(),
        limits=Limits(unread_events=2),
        worker=fixed(model=0.5, index=6.0),
    ) as pipeline:
        async with pipeline.session("3 1", max_new_tokens=40, ignore_eos=True) as session:
            async for event in session:
                statistics = event.statistics if isinstance(event, Done) else None
                await anyio.sleep(30.0)
        # The first commit comes at 8 s and is read at once, the next two at 16 and 24 s: full. From then on one is read
        # every 30 s, after which the eight seconds of a step pass, until the tenth.
        assert statistics is not None
        assert statistics.latency_s == pytest.approx(24 + sum((14 + 8, *[30] * 6)))
        assert statistics.reader_s == pytest.approx(14 + 6 * 22)


def test_a_deadline_that_nothing_can_keep_says_little_of_other_sessions() -> None:
    """The first request, and one in four, want their answers before the first search is home."""
    adaptive, luck = Adaptive(), Random(0)
    chosen = []
    for number in range(120):
        chosen.append(adaptive.choose(REQUEST))
        hopeless = number == 0 or luck.random() < 0.25
        taken = Statistics(latency_s=0.01, kb_calls=1, kb_queries=1) if hopeless else OWN.statistics(chosen[-1])
        adaptive.learn(REQUEST, chosen[-1], taken)
    assert Counter(type(each) for each in chosen[20:])[Continuous] >= 90


async def test_a_first_choice_that_misses_every_deadline_is_left() -> None:
    served = []
    async with Pipeline(
        model=FakeModel(ends=False),
        retriever=FakeRetriever(documents=300, dimension=8, spread=5),
        workload=InContext(),
        speculation=Adaptive((Slow(), Sequential())),
        worker=fixed(model=0.1, index=0.1, encoder=0.02),
    ) as pipeline:
        for n in range(12):
            try:
                await pipeline.complete(f"3 1 {n}", max_new_tokens=40, deadline_s=8.0)
                served.append(n)
            except DeadlineExceeded:
                pass
    assert served[0] == 1 and len(served) == 11, "the first misses it, and from then on the other serves"


def test_what_never_gets_on_is_tried_ever_more_seldom() -> None:
    """A trial of it lasts until the session's deadline, and no step is committed meanwhile."""
    adaptive, slow = Adaptive((Continuous(), Slow(), Sequential())), 0
    for _ in range(500):
        chosen = adaptive.choose(REQUEST)
        statistics = World({Continuous: 1.0, Slow: 1.0, Sequential: 9.0}, a=0.1, b=0.5).statistics(chosen)
        if isinstance(chosen, Slow):
            slow += 1
            statistics.steps = 0
        adaptive.learn(REQUEST, chosen, statistics)
    assert 2 <= slow <= 8


@pytest.mark.parametrize(("deadline_s", "stall_s", "error"), [(100.0, 1000.0, DeadlineExceeded), (1e6, 50.0, Stalled)])
async def test_a_trial_that_is_cut_short_is_learned_from(
    deadline_s: float, stall_s: float, error: type[Exception]
) -> None:
    learned = []

    class Noting(Adaptive):
        def learn(self, request: Request, arrangement: Arrangement, statistics: Statistics) -> None:
            learned.append((type(arrangement), statistics.steps))
            super().learn(request, arrangement, statistics)

    async with Pipeline(
        model=FakeModel(ends=False),
        retriever=FakeRetriever(documents=300, dimension=8, spread=5),
        workload=InContext(),
        speculation=Noting((Synchronous(speculation_stride=1), Slow(), Sequential())),
        worker=fixed(model=0.1, index=1.0, encoder=0.02),
        limits=Limits(stall_s=stall_s),
    ) as pipeline:
        with pytest.raises(error):
            await pipeline.complete("3 1", max_new_tokens=400, deadline_s=deadline_s)
    assert [kind for kind, _ in learned] == [Synchronous, Slow]
    assert learned[-1] == (Slow, 0)


@dataclass(frozen=True)
class Slow(Sequential):
    """Sends its checks out only when the window is full, and drafts nothing: it never gets on."""

    def checks_due(self, outlook: Outlook) -> bool:
        return False


async def test_only_sessions_that_ended_well_are_learned_from() -> None:
    learned = []

    class Noting(Adaptive):
        def learn(self, request: Request, arrangement: Arrangement, statistics: Statistics) -> None:
            learned.append((type(arrangement), statistics.steps))

    class Late(FakeRetriever):
        def search(self, queries: Any, k: int) -> Any:
            if len(self.searches) > 5:
                raise RetrieverFailed("gone")
            return super().search(queries, k)

    async with Pipeline(
        model=FakeModel(ends=False),
        retriever=Late(documents=300),
        speculation=Noting((Sequential(),)),
        limits=Limits(sessions=2),
        worker=fixed(model=0.1, index=0.1),
    ) as pipeline:
        await pipeline.complete("3 1", max_new_tokens=8)
        with pytest.raises(RetrieverFailed):
            await pipeline.complete("3 1 4", max_new_tokens=40)
    assert learned == [(Sequential, 2)]
