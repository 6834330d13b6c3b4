"""The rules of the cycle, R8 to R12: readers, ends, faults, draining and the watchdog. See `test_rules.py`."""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import anyio
import numpy as np
import pytest
from clocks import VirtualLoop, run
from fakes import VOCABULARY, FakeModel, FakeRetriever, Workers, fixed
from oracle import sequential
from scenes import PROMPT, TOKENS, Lingers, exact, expected, opened, state, until, waiting
from simulation import STAGES, Bad, deadly

from ralmspec.pipeline import (
    Asynchronous,
    Cancelled,
    Committed,
    DeadlineExceeded,
    Done,
    EngineDead,
    Limits,
    ModelFailed,
    NotServing,
    Pipeline,
    Ranking,
    RetrieverFailed,
    Sequential,
    SessionStream,
    Stalled,
    Synchronous,
)
from ralmspec.stages.arrangement import Outlook
from ralmspec.stages.model import Frontier
from ralmspec.stages.request import Status
from ralmspec.stages.verify import Verify

# R8 The client never holds a stage -------------------------------------------------------------------------------


def test_r8_a_reader_that_stays_away_pauses_its_own_session_only() -> None:
    async def scenario(away: bool) -> float:
        model, limit = FakeModel(ends=False), 2
        speculation = Asynchronous(speculation_stride=2)
        async with opened(model=model, limits=Limits(unread_events=limit), speculation=speculation) as pipeline:
            async with pipeline.session(PROMPT, max_new_tokens=40) as session:
                if away:
                    await anyio.sleep(100)
                    passes = model.passes
                    await anyio.sleep(100)
                    assert model.passes == passes, "work goes on although nobody reads"
                    assert limit <= waiting(session) <= limit + speculation.window
                began = anyio.current_time()
                await exact(pipeline, "2 7 1 8")
                beside = anyio.current_time() - began
                tokens: list[int] = []
                async for event in session:  # and who comes back gets everything
                    assert waiting(session) <= limit + speculation.window
                    tokens += event.tokens if isinstance(event, Committed) else ()
                assert tokens == expected(pipeline, PROMPT, 40)
            return beside

    assert run(scenario, True) <= run(scenario, False)


def test_r8_one_event_at_a_time_is_enough() -> None:
    async def scenario() -> None:
        async with opened(limits=Limits(unread_events=1)) as pipeline:
            await exact(pipeline)

    run(scenario)


# R9 Exactly one end ----------------------------------------------------------------------------------------------


def test_r9_the_first_end_wins_and_is_told_once() -> None:
    async def scenario() -> None:
        passed = Lingers()
        pipeline = opened(output=[passed], limits=Limits(unread_events=2))
        async with pipeline, pipeline.session(PROMPT, max_new_tokens=40, deadline_s=2) as session:
            await anyio.sleep(1)
            session.cancel()
            await anyio.sleep(2)  # the deadline passes
            session.cancel()
            state(session).finish(Status.FAILED, RetrieverFailed("late"))
            with pytest.raises(Cancelled):
                async for event in session:
                    assert not isinstance(event, Done)
        assert [type(event) for event in passed.events].count(Done) == 1
        assert isinstance(passed.events[-1], Done)

    run(scenario)


@pytest.mark.parametrize("end", ["done", "cancel", "deadline", "fault", "closed"])
def test_r9_a_stream_that_was_cut_never_looks_complete(end: str) -> None:
    run(ended, end)


async def ended(end: str) -> None:
    """A session comes to this end; its reader must learn which."""
    errors = {"cancel": Cancelled, "deadline": DeadlineExceeded, "fault": ModelFailed, "closed": NotServing}
    tokens: list[int] = []

    async def read() -> None:
        async for event in session:
            if isinstance(event, Committed):
                tokens.extend(event.tokens)
        assert isinstance(event, Done)

    def fault(name: str) -> None:
        raise ModelFailed("no memory")

    workers = Workers(model=0.1, index=0.25)
    session: SessionStream
    async with anyio.create_task_group() as readers, opened(worker=workers, limits=Limits(drain_s=0.5)) as pipeline:
        session = pipeline.session(PROMPT, max_new_tokens=30, deadline_s=1.5 if end == "deadline" else 1000)
        await session.__aenter__()
        if end == "done":
            await read()
        else:
            readers.start_soon(raises, errors[end], read)
            await anyio.sleep(1)
            if end == "cancel":
                session.cancel()
            elif end == "fault":
                workers["model"].fault = fault
            if end != "closed":
                await until(lambda: not pipeline.live_sessions)
    truth = expected(pipeline, PROMPT, 30)
    assert tokens == truth[: len(tokens)]
    assert (tokens == truth) == (end == "done")


async def raises(error: type[Exception], read: Callable[[], Any]) -> None:
    """The reader sees this error."""
    with pytest.raises(error):
        await read()


def test_r9_leaving_the_block_is_an_end() -> None:
    async def scenario() -> None:
        async with opened() as pipeline:
            async with pipeline.session(PROMPT, max_new_tokens=400) as session:
                await anext(session)
            assert state(session).final
            await until(lambda: not pipeline.live_sessions)
            assert anyio.current_time() < 3, "it went on to its end"

    run(scenario)


# R10 Fault scope -------------------------------------------------------------------------------------------------

UNLUCKY = "9 9 9"


class Choosy(FakeRetriever):
    """Cannot score the question of one session."""

    def __init__(self, where: str) -> None:
        super().__init__(documents=1)
        self.where = where

    def score(self, query: Any, rows: Any) -> Any:
        if self.where == "score" and query.text.startswith(f"{UNLUCKY} ") and isinstance(rows, np.ndarray):
            raise ValueError("score")
        return super().score(query, rows)

    def _rank(self, query: Any, k: int) -> Ranking:
        return Ranking(np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.float32))


class Moody(FakeModel):
    """Continues several prefixes at once; one session it cannot ask for, not continue, or not write down."""

    max_batch = 8

    def __init__(self, where: str) -> None:
        super().__init__(ends=False)
        self.where = where
        self.unwritable: list[int] = []
        self.together = 0

    def decode(self, tokens: Any) -> str:
        text = super().decode(tokens)
        if self.where == "query" and text.startswith(UNLUCKY) and len(tokens) == 7:
            raise ValueError("query")
        if self.where.startswith("text") and list(tokens) == self.unwritable:
            raise ValueError("text")
        return text

    def forward(self, prefixes: Any) -> list[Frontier]:
        frontiers = super().forward(prefixes)
        for place, prefix in enumerate(prefixes):
            if bytes([9, 9, 9]) in bytes(prefix.tokens.tolist()):
                self.together += len(prefixes) > 1
                if self.where == "logits" and len(prefix.tokens) > 10:
                    frontiers[place] = Frontier(np.full(VOCABULARY, np.nan))
        return frontiers


@pytest.mark.parametrize("where", ["query", "score", "logits", "text when decoded", "text when judged"])
def test_r10_one_sessions_fault_is_its_own(where: str) -> None:
    """Sessions that are together in every batch, one of which cannot be served: the others must not notice."""
    run(one_unlucky, where)


async def one_unlucky(where: str) -> None:
    model, retriever = Moody(where), Choosy(where)
    truth = sequential(model, retriever, [9, 9, 9], max_new_tokens=4, retrieval_stride=2)[0]
    model.unwritable = truth if where.startswith("text") else []
    pipeline = opened(
        model=model,
        retriever=retriever,
        speculation=Sequential() if where == "text when decoded" else Synchronous(speculation_stride=3),
        worker=fixed(model=0.1, index=0.1, encoder=0.1),
    )
    async with pipeline, anyio.create_task_group() as callers:
        async with pipeline.session(PROMPT):  # keeps the encoder busy until all the others wait for it
            await anyio.sleep(0.05)
            for prompt in ("3 1 4", "2 7 1 8"):
                callers.start_soon(exact, pipeline, prompt)
            await anyio.sleep(0.01)
        with pytest.raises((ValueError, ModelFailed, RetrieverFailed), match=where.split()[0]):
            await pipeline.complete(UNLUCKY, max_new_tokens=TOKENS)
    assert model.together, "they were in no batch together"


@pytest.mark.parametrize("stage", ["encoder", "model", "index", "prefetch"])
def test_r10_a_batchs_fault_is_its_members(stage: str) -> None:
    """Two sessions are in the call that fails; one that comes later, and the engine, do not notice."""
    run(one_bad_call, stage)


async def one_bad_call(stage: str) -> None:
    workers = Workers(model=0.1, index=0.1, encoder=0.1, prefetch=0.1)
    model = FakeModel(ends=False)
    model.max_batch = 8
    failed = 0

    def fault(name: str) -> None:
        workers[stage].fault = lambda name: None
        raise (ModelFailed if name == "model" else RetrieverFailed)("once")

    async def fail() -> None:
        nonlocal failed
        with pytest.raises((ModelFailed, RetrieverFailed), match="once"):
            await exact(pipeline)
        failed += 1

    pipeline = opened(model=model, worker=workers)
    async with pipeline:
        workers[stage].fault = fault
        async with anyio.create_task_group() as callers:
            callers.start_soon(fail)
            await until(lambda: failed)
        async with anyio.create_task_group() as callers:
            callers.start_soon(exact, pipeline)
            callers.start_soon(exact, pipeline, "2 7 1 8")
        assert pipeline.ready


@pytest.mark.parametrize("dying", ["Lookup", "Generate", "Verify", "Prefetch", "output"])
@pytest.mark.parametrize("empty_handed", [False, True], ids=["with turns", "without"])
def test_r10_a_dead_stage_fails_all(dying: str, empty_handed: bool) -> None:
    """Every reader is told, nobody is let in, leaving says why; whether turns died with the stage or not."""
    stage = next((stage for stage in STAGES if stage.__name__ == dying), None)
    with deadly(stage, 4, empty_handed) if stage else nullcontext():
        run(one_death, [] if stage else [Mortal()])


async def one_death(output: list[Any]) -> None:
    told = 0

    async def fail(prompt: str) -> None:
        nonlocal told
        with pytest.raises(EngineDead, match="deadly"):
            await pipeline.complete(prompt, max_new_tokens=400)
        told += 1

    pipeline = opened(output=output)
    with pytest.raises(EngineDead, match="deadly") as death:
        async with pipeline:
            async with anyio.create_task_group() as callers:
                for prompt in ("3 1 4", "2 7 1 8", "5 3 5"):
                    callers.start_soon(fail, prompt)
            assert told == 3 and not pipeline.ready
            assert anyio.current_time() < 5
            with pytest.raises(EngineDead):
                await pipeline.complete(PROMPT)
    assert isinstance(death.value.__cause__, Bad)
    assert not pipeline.live_sessions


def test_r10_readers_are_told_of_a_death_at_once() -> None:
    """Also the one whose pass is running and takes a minute; only leaving waits for that."""

    async def scenario() -> None:
        told: list[float] = []

        async def fail(prompt: str) -> None:
            with pytest.raises(EngineDead, match="deadly"):
                await pipeline.complete(prompt)
            told.append(anyio.current_time())

        pipeline = opened(worker=fixed(model=60.0, index=0.25))
        with pytest.raises(EngineDead, match="deadly"):
            async with pipeline, anyio.create_task_group() as callers:
                callers.start_soon(fail, PROMPT)
                await anyio.sleep(1)
                callers.start_soon(fail, "2 7")
        assert len(told) == 2 and max(told) < 2
        assert anyio.current_time() == pytest.approx(60.25)

    with deadly(Verify, 4, False):
        run(scenario)


class Panic(BaseException):
    """Not an `Exception`: what a crash in a native library may raise."""


@pytest.mark.parametrize("where", ["encoder", "model", "index", "prefetch"])
def test_r10_a_panic_is_a_death(where: str) -> None:
    run(one_panic, where)


async def one_panic(where: str) -> None:
    workers = Workers(model=0.1, index=0.25, encoder=0.02, prefetch=0.01)
    ends: list[tuple[BaseException, float]] = []

    def panic(name: str) -> None:
        raise Panic("deadly")

    async def ask(prompt: str) -> None:
        try:
            await pipeline.complete(prompt, max_new_tokens=400)
        except Exception as error:
            ends.append((error, anyio.current_time()))

    pipeline = opened(worker=workers)
    with pytest.raises((EngineDead, BaseExceptionGroup), match="deadly|unhandled"):
        async with pipeline:
            readers = [asyncio.create_task(ask(prompt)) for prompt in ("3 1 4", "2 7 1 8", "5 3 5")]
            await anyio.sleep(1)
            workers[where].fault = panic
            await anyio.sleep(5)
    await asyncio.wait(readers)
    assert anyio.current_time() < 7, "leaving waits for calls that cannot come home"
    assert [type(error) for error, _ in ends] == [EngineDead] * 3 and max(at for _, at in ends) < 2
    assert not pipeline.live_sessions


class Mortal(Lingers):
    """An output stage that raises after a second."""

    async def run(self, inbox: Any, outbox: Any) -> None:
        with anyio.move_on_after(1):
            await super().run(inbox, outbox)
        raise Bad("deadly")


class Rude(RetrieverFailed):
    """An error that cannot be made again from its arguments; a user's retriever may raise such a one."""

    def __init__(self, what: str, *, code: int) -> None:
        super().__init__(f"{what} ({code})")


def test_r10_whatever_a_call_raises_is_no_death() -> None:
    async def scenario() -> None:
        workers = Workers(model=0.1, index=0.1)
        async with opened(worker=workers) as pipeline:
            for error in (Rude("rude", code=3), KeyError("rude"), ExceptionGroup("rude", [ValueError()])):

                def fault(name: str, error: Exception = error) -> None:
                    raise error

                workers["index"].fault = fault
                with pytest.raises(type(error), match="rude"):
                    await pipeline.complete(PROMPT)
                workers["index"].fault = lambda name: None
                await exact(pipeline)

    run(scenario)


# R11 Drain order -------------------------------------------------------------------------------------------------


def test_r11_draining_lets_sessions_end_and_nobody_in() -> None:
    async def scenario() -> None:
        async with anyio.create_task_group() as callers:
            async with opened() as pipeline:
                callers.start_soon(exact, pipeline)
                callers.start_soon(exact, pipeline, "2 7 1 8")
                await anyio.sleep(0.5)
                callers.start_soon(refused, pipeline)
            assert not pipeline.live_sessions
            assert 1 < anyio.current_time() < 10

    run(scenario)


async def refused(pipeline: Pipeline) -> None:
    """Nobody is let in once draining has begun, though everybody who was in goes on."""
    await anyio.sleep(0.1)
    assert pipeline.live_sessions == 2 and not pipeline.ready
    with pytest.raises(NotServing):
        await pipeline.complete(PROMPT)


def test_r11_then_the_rest_is_ended_and_thread_calls_are_waited_for() -> None:
    """Sessions may go on for 2 s; a call of 50 s is under way then, and nothing is closed before it has come home."""

    async def scenario() -> None:
        workers, model = Workers(model=0.1, index=0.25), FakeModel(ends=False)
        async with anyio.create_task_group() as callers:
            async with opened(model=model, worker=workers, limits=Limits(drain_s=2)) as pipeline:
                told = anyio.Event()

                async def cut() -> None:
                    with pytest.raises(NotServing):
                        await pipeline.complete(PROMPT, max_new_tokens=400)
                    assert anyio.current_time() == pytest.approx(3)
                    told.set()

                callers.start_soon(cut)
                await anyio.sleep(0.9)
                workers.seconds["model"] = 50.0
                await anyio.sleep(0.1)
            assert told.is_set()
            assert workers["model"].log[-1][1] == anyio.current_time() > 50
            assert not pipeline.live_sessions and len(model.forgotten) == 1

    run(scenario)


# R12 Watchdog ----------------------------------------------------------------------------------------------------

FOR_EVER = float("inf")


class Forgetful(Sequential):
    """An arrangement that never sends a check out: its sessions could act, and are never told to."""

    def checks_due(self, outlook: Outlook) -> bool:
        return False


def test_r12_a_session_without_progress_is_failed_in_time() -> None:
    async def scenario() -> None:
        async with opened(speculation=Forgetful(), limits=Limits(stall_s=7)) as pipeline:
            for begun in (0, 7, 14):
                with pytest.raises(Stalled, match=r"7 s: <session .* 1 checks queued"):
                    await pipeline.complete(PROMPT)
                assert anyio.current_time() == pytest.approx(begun + 7, abs=0.1)
            assert not pipeline.live_sessions

    run(scenario)


def test_r12_other_sessions_do_not_hide_a_stalled_one() -> None:
    """One session is not told to act any more; others keep the stages busy meanwhile."""

    async def scenario() -> None:
        pipeline = opened(limits=Limits(stall_s=7))
        async with pipeline, anyio.create_task_group() as callers, pipeline.session(PROMPT) as session:
            callers.start_soon(exact, pipeline, "2 7", 400)
            state(session).arrangement = Forgetful()
            with pytest.raises(Stalled):
                async for _ in session:
                    pass
            assert 7 <= anyio.current_time() < 8
            assert pipeline.live_sessions == 1

    run(scenario)


def test_r12_the_time_a_reader_stays_away_does_not_count() -> None:
    """Everything is paused for almost as long as the limit, then goes on: that is not the fault of the session."""

    async def scenario(away_s: float) -> None:
        limits = Limits(stall_s=10, unread_events=1)
        async with opened(limits=limits, worker=fixed(model=1.0)) as pipeline:
            tokens: list[int] = []
            async with pipeline.session(PROMPT, max_new_tokens=TOKENS) as session:
                async for event in session:
                    if isinstance(event, Committed):
                        tokens += event.tokens
                        await anyio.sleep(away_s)
            assert tokens == expected(pipeline)

    for halves in range(60):
        run(scenario, halves / 2)


def test_r12_a_long_call_is_no_stall() -> None:
    async def scenario() -> None:
        async with opened(worker=fixed(model=0.1, index=20.0), limits=Limits(stall_s=7, call_s=21)) as pipeline:
            await exact(pipeline)

    run(scenario)


@pytest.mark.parametrize("stall_s", [0.1, 0.3, 0.7, 1.1, 5.3])
def test_r12_the_watchdog_itself_never_spins(stall_s: float) -> None:
    """A watchdog that wakes up too early, and finds nothing to do, would not let the clock go on."""

    async def scenario() -> None:
        workers = fixed(model=0.1, index=0.1, encoder=0.1)
        async with opened(worker=workers, speculation=Forgetful(), limits=Limits(stall_s=stall_s)) as pipeline:
            for begun in range(20):
                with pytest.raises(Stalled):
                    await pipeline.complete(f"{begun} 1")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VirtualLoop, "turns", 20_000)
        run(scenario)


def test_r12_deadlines_come_in_time() -> None:
    async def scenario() -> None:
        async with opened() as pipeline:
            for deadline_s in (0.001, 0.1, 0.7, 1.3):
                began = anyio.current_time()
                with pytest.raises(DeadlineExceeded):
                    await pipeline.complete(PROMPT, max_new_tokens=400, deadline_s=deadline_s)
                assert anyio.current_time() == pytest.approx(began + deadline_s, abs=0.0011)
            with pytest.raises(DeadlineExceeded):  # of a reader that stays away, too
                async with pipeline.session(PROMPT, max_new_tokens=400, deadline_s=5) as session:
                    await anyio.sleep(30)
                    async for _ in session:
                        pass
            await exact(pipeline)

    run(scenario)


@pytest.mark.parametrize("hung", ["encoder", "model", "index", "prefetch"])
@pytest.mark.parametrize("wanted", [True, False], ids=["waited for", "cancelled"])
def test_r12_a_hung_call_is_the_death_of_the_engine(hung: str, wanted: bool) -> None:
    """In time, and also where the session whose call it is has ended meanwhile."""
    run(hangs_for_ever, hung, wanted)


async def hangs_for_ever(hung: str, wanted: bool) -> None:
    workers = Workers(model=0.1, index=0.25, encoder=0.02, prefetch=0.01)
    with pytest.raises(EngineDead, match=hung):
        async with opened(worker=workers, limits=Limits(call_s=50, stall_s=7)) as pipeline:
            async with pipeline.session(PROMPT, max_new_tokens=3000) as session:
                workers.seconds[hung] = FOR_EVER
                await until(lambda: workers[hung].running)
                began = anyio.current_time()
                if wanted:
                    with pytest.raises(EngineDead):
                        async for _ in session:
                            pass
            await until(lambda: not pipeline.ready)
            assert anyio.current_time() == pytest.approx(began + 50, abs=0.1)
    assert not pipeline.live_sessions


@pytest.mark.parametrize("hung", ["encoder", "model", "index", "prefetch"])
def test_r12_draining_waits_for_a_hung_call_until_the_deadline_only(hung: str) -> None:
    run(hangs_while_draining, hung)


async def hangs_while_draining(hung: str) -> None:
    workers = Workers(model=0.1, index=0.25, encoder=0.02, prefetch=0.01)
    with pytest.raises(EngineDead):
        async with opened(worker=workers, limits=Limits(drain_s=3, call_s=20)) as pipeline:
            async with pipeline.session(PROMPT):
                workers.seconds[hung] = FOR_EVER
                await until(lambda: workers[hung].running)
                began = anyio.current_time()
                await anyio.sleep(0.5)
            left = anyio.current_time()
    assert began + 19.9 <= anyio.current_time() <= left + 3 + 20
    assert not pipeline.live_sessions
