"""The rules of the cycle, R1 to R7: at least one test for each, which fails when the rule is broken.

`mutants.py` breaks them, `test_mutants.py` sees that every break is caught. So each test here is a plain function that
runs on loops of its own. R8 to R12 are in `test_rules_of_*.py`.
"""

import inspect
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from clocks import interrupted, run
from fakes import AlwaysMisses, Arguments, FakeModel, FakeRetriever, Result, VirtualWorker, Workers, fixed
from scenes import PROMPT, TOKENS, Lingers, exact, opened, state, until
from simulation import Eager

from ralmspec.pipeline import (
    Arrangement,
    Asynchronous,
    Continuous,
    Done,
    Limits,
    Overloaded,
    RetrieverFailed,
    Synchronous,
)
from ralmspec.stages.errors import InvariantBroken
from ralmspec.stages.messages import Pass, Place, Turn
from ralmspec.stages.session import Session
from ralmspec.stages.switch import Switch
from ralmspec.stages.transcript import Transcript

# R1 Admission ----------------------------------------------------------------------------------------------------


def test_r1_admission_never_exceeds_the_slots() -> None:
    async def scenario() -> None:
        pipeline = opened(limits=Limits(sessions=4, waiting=0))
        outcomes: list[bool] = []
        async with pipeline:

            async def arrive() -> None:
                try:
                    async with pipeline.session(PROMPT, max_new_tokens=TOKENS):
                        outcomes.append(True)
                        assert pipeline.live_sessions <= 4
                        await anyio.sleep(1)
                except Overloaded as refusal:
                    outcomes.append(False)
                    assert refusal.retry_after_s > 0

            async with anyio.create_task_group() as callers:
                for _ in range(12):
                    callers.start_soon(arrive)
            assert sorted(outcomes) == [False] * 8 + [True] * 4
            await until(lambda: not pipeline.live_sessions)
            await exact(pipeline)

    for seed in range(10):
        run(scenario, seed=seed)


def test_r1_a_slot_is_taken_in_one_go_or_not_at_all() -> None:
    """Cut at every suspension of entering: never a session that nobody holds."""

    async def scenario(at: int) -> bool:
        pipeline = opened(limits=Limits(sessions=1, unread_events=1))

        async def enter() -> None:
            stream = pipeline.session(PROMPT)
            await stream.__aenter__()  # a cut in here means that the block is never entered, so never left
            await stream.__aexit__(None, None, None)

        async with pipeline:
            with anyio.CancelScope() as scope:
                await interrupted(enter(), at, scope.cancel)
            await until(lambda: not pipeline.live_sessions)
            await exact(pipeline)
            return scope.cancelled_caught

    assert run(scenario, 1), "entering is a checkpoint"
    at = 2
    while run(scenario, at):
        at += 1


# R2 One owner ----------------------------------------------------------------------------------------------------


class Guarded(VirtualWorker):
    """Sees that work in it changes no session, and that its inputs are the session's no more."""

    working = False
    sessions: Any = ()

    async def call(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        for session in list(self.sessions):
            transcript = [getattr(session.transcript, name) for name in Transcript.__slots__]
            state = [*vars(session).values(), *transcript]
            own = {id(value) for value in state if isinstance(value, (list, deque, dict, set))}
            shared = [value for value in parts(arguments) if id(value) in own]
            assert not shared, f"a thread got state of {session}"

        def guarded(*arguments: *Arguments) -> Result:
            Guarded.working = True
            try:
                return work(*arguments)
            finally:
                Guarded.working = False

        return await super().call(guarded, *arguments)


def parts(value: Any) -> list[Any]:
    """The value and everything in it that a message can hold."""
    if isinstance(value, (list, tuple)):
        return [value, *(part for item in value for part in parts(item))]
    if isinstance(value, Pass):
        return [value.context, value.retrieved]
    assert not isinstance(value, Session), "a thread got a session"
    return [value]


def test_r2_only_sections_on_the_loop_change_a_session() -> None:
    sections = [f for _, f in inspect.getmembers(Session, inspect.isfunction)]
    assert len(sections) > 15
    assert not [f.__qualname__ for f in sections if inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f)]

    def guarded_set(self: Session | Transcript, name: str, value: Any) -> None:
        assert not Guarded.working, f"a thread wrote {name}"
        object.__setattr__(self, name, value)

    async def scenario() -> None:
        pipeline = opened(worker=lambda name, threads: Guarded(name, lambda name: 0.1))
        async with pipeline:
            Guarded.sessions = pipeline._runner.switch.live.values()  # type: ignore[union-attr]
            await exact(pipeline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__setattr__", guarded_set)
        patch.setattr(Transcript, "__setattr__", guarded_set)
        run(scenario)


# R3 Rollback is a write ------------------------------------------------------------------------------------------


def test_r3_a_rollback_is_a_write_and_a_wake() -> None:
    """After every section that rolls back: one epoch later, the true document stored, nothing speculated left."""
    seen = 0
    judge = Session.judge

    def watched(session: Session, verdicts: Any, **named: float) -> None:
        nonlocal seen
        epoch = session.epoch
        judge(session, verdicts, **named)
        if session.final or session.epoch == epoch:
            return
        seen += 1
        assert session.epoch == epoch + 1
        (redone,) = session.transcript.steps
        assert redone.certain and not redone.tokens and not session.checks.queued
        (true,) = [verdict.truth for verdict in verdicts if verdict.step == redone.index]
        assert redone.retrieved is not None and redone.retrieved.ids[0] == true.ids[0]
        assert session.transcript.context[len(session.request.prompt) :] == session.transcript.committed

    async def scenario(speculation: Arrangement) -> None:
        async with opened(retriever=AlwaysMisses(), speculation=speculation) as pipeline:
            answer = await exact(pipeline)
            assert answer.statistics.rollbacks == TOKENS // 2 - 1

    for speculation in (Synchronous(speculation_stride=3), Asynchronous(speculation_stride=2), Eager(window=3)):
        seen = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "judge", watched)
            run(scenario, speculation)
        assert seen == TOKENS // 2 - 1


# R4 Stale is harmless --------------------------------------------------------------------------------------------


def test_r4_stale_tokens_and_look_ups_are_dropped() -> None:
    """Verdicts come in the middle of passes and of look-ups; what those bring is of an older epoch."""

    async def scenario(index_s: float) -> None:
        workers = fixed(model=0.1, index=index_s, encoder=0.05)
        pipeline = opened(retriever=AlwaysMisses(), speculation=Asynchronous(speculation_stride=1), worker=workers)
        async with pipeline:
            answer = await exact(pipeline)
            assert answer.statistics.wasted_tokens >= answer.statistics.rollbacks > 0

    for index_s in (0.13, 0.18, 0.22):
        run(scenario, index_s)


def test_r4_stale_verdicts_are_dropped() -> None:
    """Batches of three, of which the first verdict is a rollback: the others judge nothing any more."""

    async def scenario() -> None:
        async with opened(retriever=AlwaysMisses(), speculation=Synchronous(speculation_stride=3)) as pipeline:
            statistics = (await exact(pipeline)).statistics
            assert statistics.checked == statistics.rollbacks == TOKENS // 2 - 1
            assert statistics.kb_queries > statistics.checked + 3

    run(scenario)


def test_r4_stale_verdicts_of_another_batch_are_dropped() -> None:
    """Three batches are in flight when the first one's verdict is a rollback; the others come home later."""

    async def scenario() -> None:
        retriever = AlwaysMisses()
        retriever.concurrency = 3
        speculation = Continuous(window=9, flights=3, prefetch=1, token_check=False)
        workers = fixed(model=0.01, index=0.2)
        async with opened(retriever=retriever, speculation=speculation, worker=workers) as pipeline:
            statistics = (await exact(pipeline)).statistics
            assert statistics.checked == statistics.rollbacks == TOKENS // 2 - 1
            assert statistics.kb_calls > statistics.checked + 3

    run(scenario)


def test_r4_ids_are_never_used_twice() -> None:
    """Not even by two pipelines that share a model, and so its memory."""

    async def scenario() -> None:
        async with opened(limits=Limits(sessions=2)) as pipeline:
            for _ in range(4):
                async with pipeline.session(PROMPT) as session:
                    ids.append(session.id)
                    await anyio.sleep(0.3)
                await until(lambda: not pipeline.live_sessions)

    ids: list[int] = []
    run(scenario)
    run(scenario)
    assert len(set(ids)) == 8


# R5 Credits follow messages --------------------------------------------------------------------------------------


class InFlight(VirtualWorker):
    """Counts the searches, and the queries, that are with the knowledge base."""

    flights = 0
    most_flights = 0
    now = 0
    most = 0

    async def call(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        batch: Any = arguments
        queries = sum(len(checks) for checks in batch[0]) if self.name == "index" else 0
        InFlight.flights += queries > 0
        InFlight.now += queries
        InFlight.most_flights = max(InFlight.most_flights, InFlight.flights)
        InFlight.most = max(InFlight.most, InFlight.now)
        try:
            return await super().call(work, *arguments)
        finally:
            InFlight.now -= queries
            InFlight.flights -= queries > 0


@pytest.mark.parametrize("misses", [False, True])
def test_r5_a_session_has_at_most_k_checks_in_flight(misses: bool) -> None:
    async def scenario(kind: type[Eager | Continuous], window: int, flights: int) -> None:
        retriever = AlwaysMisses() if misses else FakeRetriever(documents=1)
        retriever.concurrency = 8
        delay = {"model": 0.01, "index": 0.5}
        async with opened(
            retriever=retriever,
            speculation=kind(window=window, flights=flights),
            worker=lambda name, threads: InFlight(name, lambda name: delay.get(name, 0.0)),
        ) as pipeline:
            await exact(pipeline)
            await until(lambda: not pipeline.live_sessions)

    for window, flights in ((2, 1), (3, 1), (5, 1), (5, 2), (3, 8)):
        InFlight.now = InFlight.most = InFlight.most_flights = 0
        run(scenario, Eager, window, flights)
        assert 1 <= InFlight.most <= window and not InFlight.now
        assert InFlight.most_flights <= flights
        assert misses or InFlight.most_flights == min(window, flights)
    assert misses or InFlight.most == 3
    for window, flights in ((3, 2), (4, 3), (6, 2)):
        InFlight.most = 0
        run(scenario, Continuous, window, flights)
        assert InFlight.most <= window and not InFlight.now


def test_r5_credits_come_home_from_faults_and_ended_sessions() -> None:
    """Three sessions end while their checks are in flight; the fourth finds slot and credits."""

    async def scenario(breaks: bool) -> None:
        workers, sessions = Workers(model=0.1, index=0.25), list[Session]()
        async with opened(limits=Limits(sessions=1), worker=workers) as pipeline:
            for _ in range(3):
                async with pipeline.session(PROMPT) as session:
                    sessions.append(state(session))
                    await until(lambda: sessions[-1].checks.flying)
                    if breaks:
                        workers["index"].fault = fault
                        with pytest.raises(RetrieverFailed, match="once"):
                            async for _ in session:
                                pass
                        workers["index"].fault = lambda name: None
                    else:
                        session.cancel()
                assert breaks or sessions[-1].checks.flying, "an ended session keeps its credits until they are home"
                await until(lambda: not pipeline.live_sessions)
                assert not sessions[-1].checks.flying
            await exact(pipeline)

    def fault(name: str) -> None:
        raise RetrieverFailed("once")

    run(scenario, True)
    run(scenario, False)


# R6 A slot is free only when everything is home ------------------------------------------------------------------


@pytest.mark.parametrize("out", ["encoder", "model", "index", "prefetch", "output"])
def test_r6_a_slot_is_kept_until_work_is_home(out: str) -> None:
    """One of the calls takes 50 s. The session is cancelled in the middle of it."""
    run(cancelled_in_the_middle, out)


async def cancelled_in_the_middle(out: str) -> None:
    workers = Workers(**{"model": 0.1, "index": 0.25, "encoder": 0.02, "prefetch": 0.01} | {out: 50.0})
    output = [Lingers(50.0)] if out == "output" else []
    model = FakeModel(ends=False)
    async with opened(model=model, limits=Limits(sessions=1, waiting=0), worker=workers, output=output) as pipeline:
        async with pipeline.session(PROMPT) as session:
            if out != "output":
                await until(lambda: workers[out].running)
        left = anyio.current_time()
        workers.seconds.clear()
        with pytest.raises(Overloaded):
            await pipeline.complete(PROMPT)
        assert not model.forgotten, "a running call may still use what the model keeps for the session"
        await until(lambda: not pipeline.live_sessions)
        assert anyio.current_time() == pytest.approx(left + 50, abs=0.5)
        assert model.forgotten == [session.id]
        await exact(pipeline)


def test_r6_a_turn_in_a_queue_is_not_home() -> None:
    """Two sessions, one search at a time: the second one's turn waits behind the first one's search."""

    async def scenario() -> None:
        workers = Workers(index=50.0)
        async with opened(limits=Limits(sessions=2), worker=workers) as pipeline:
            async with pipeline.session(PROMPT) as first:
                await until(lambda: workers["index"].running)
                async with pipeline.session("2 7") as second:
                    await until(lambda: state(second).checks.flying)
                assert pipeline.live_sessions == 2
                await anyio.sleep(40)
                assert pipeline.live_sessions == 2
                workers.seconds.clear()
                await until(lambda: pipeline.live_sessions < 2)
                assert 50 <= anyio.current_time() < 51
                assert isinstance([event async for event in first][-1], Done)
            await exact(pipeline)

    run(scenario)


# R7 Sizes --------------------------------------------------------------------------------------------------------


def test_r7_queues_of_n_are_enough_for_n_sessions() -> None:
    """Everybody arrives before any stage has begun to work."""

    async def scenario() -> None:
        pipeline = opened(limits=Limits(sessions=3), worker=fixed(model=0.01))
        async with pipeline, anyio.create_task_group() as callers:
            for prompt in (PROMPT, "2 7", "1 8"):
                callers.start_soon(exact, pipeline, prompt)

    for seed in range(60):
        run(scenario, seed=seed)


def test_r7_every_flight_of_a_session_has_its_place_before_verify() -> None:
    """One slot, and one search at a time, which takes long: all later batches wait in Verify's queue."""

    async def scenario() -> None:
        retriever = FakeRetriever(documents=1)
        pipeline = opened(
            retriever=retriever,
            speculation=Eager(window=8, flights=5),
            limits=Limits(sessions=1),
            worker=fixed(model=0.1, index=10.0),
        )
        async with pipeline:
            await exact(pipeline, max_new_tokens=12)
        assert retriever.searches[:3] == [1, 1, 4], "a check a flight; the four that had waited are one search"

    run(scenario)


def test_r7_a_full_queue_says_so() -> None:
    async def scenario() -> None:
        into, out = anyio.create_memory_object_stream[Turn](0)
        with into, out:
            async with opened() as pipeline, pipeline.session(PROMPT) as stream:
                switch = Switch(dict.fromkeys(Place, into), output=None, now=lambda: 0.0, released=lambda session: None)
                session = state(stream)
                session.out.clear()
                with pytest.raises(InvariantBroken, match="full"):
                    switch.send_nowait(session)
                session.out.add(Place.LOOKUP)

    run(scenario)
