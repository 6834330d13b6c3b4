"""However a session or the pipeline is left: in time, with the right error, nothing left running or unclosed."""

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from clocks import VirtualLoop, interrupted, run
from fakes import FakeModel, FakeRetriever, Workers, fixed
from scenes import PROMPT, TOKENS, Lingers, exact, expected, opened, until

from ralmspec.pipeline import (
    Cancelled,
    Committed,
    Done,
    EngineDead,
    Limits,
    NotServing,
    Overloaded,
    Pipeline,
)
from ralmspec.pipeline.threads import ThreadWorker

LONG = 3000


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.fixture(autouse=True)
def nothing_unclosed() -> Iterator[None]:
    """Whatever was not closed warns when it is collected, and warnings are errors here."""
    yield
    gc.collect()


# Leaving a session -----------------------------------------------------------------------------------------------


async def test_leaving_early_ends_the_session_only() -> None:
    async with opened() as pipeline:
        for events in (0, 1, 3):
            async with pipeline.session(PROMPT, max_new_tokens=LONG) as session:
                async for _ in session:
                    events -= 1
                    if events < 0:
                        break
        await until(lambda: not pipeline.live_sessions)
        await exact(pipeline)
    assert anyio.current_time() < 60


async def test_an_exception_in_the_block_passes_through() -> None:
    async with opened() as pipeline:
        with pytest.raises(KeyError, match="mine"):
            async with pipeline.session(PROMPT, max_new_tokens=LONG):
                raise KeyError("mine")
        await until(lambda: not pipeline.live_sessions)


async def test_cancel_from_another_task() -> None:
    async with opened() as pipeline, pipeline.session(PROMPT, max_new_tokens=LONG) as session:

        async def cancel() -> None:
            await anyio.sleep(2)
            session.cancel()

        tokens: list[int] = []
        async with anyio.create_task_group() as beside:
            beside.start_soon(cancel)
            with pytest.raises(Cancelled):
                async for event in session:
                    tokens += event.tokens if isinstance(event, Committed) else ()
        assert anyio.current_time() == pytest.approx(2)
        assert tokens and tokens == expected(pipeline, PROMPT, LONG)[: len(tokens)]


async def test_a_stream_that_another_task_reads_ends_with_an_error_when_its_block_is_left() -> None:
    async with opened() as pipeline, anyio.create_task_group() as readers:

        async def read() -> None:
            with pytest.raises(Cancelled):
                while True:
                    await anext(session)
                    await anyio.sleep(0.7)  # so that there is something unread when the block is left

        async with pipeline.session(PROMPT, max_new_tokens=LONG) as session:
            readers.start_soon(read)
            await anyio.sleep(3)


async def test_one_task_at_a_time_may_read() -> None:
    async with opened() as pipeline, pipeline.session(PROMPT) as session, anyio.create_task_group() as tasks:
        tasks.start_soon(session.__anext__)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await anext(session)
        tasks.cancel_scope.cancel()


async def test_a_session_is_entered_before_it_is_read() -> None:
    async with opened() as pipeline:
        session = pipeline.session(PROMPT)
        with pytest.raises(RuntimeError, match="async with"):
            await anext(session)
        session.cancel()  # harmless
        async with session:
            assert [event async for event in session][-1:] != []
        assert [event async for event in session] == []


# Leaving the pipeline --------------------------------------------------------------------------------------------


async def test_nobody_is_let_in_before_and_after() -> None:
    pipeline = opened()
    with pytest.raises(NotServing):
        pipeline.session(PROMPT)
    async with pipeline:
        assert pipeline.ready
        await exact(pipeline)
    assert not pipeline.ready
    with pytest.raises(NotServing):
        await pipeline.complete(PROMPT)
    async with pipeline:  # and it can be opened again
        await exact(pipeline)


async def test_the_body_raises() -> None:
    """The caller's own exception comes out as it is, not in a group; sessions do not go on for the patience's sake."""
    ended: list[BaseException] = []

    async def read(pipeline: Pipeline) -> None:
        try:
            await pipeline.complete(PROMPT, max_new_tokens=LONG)
        except NotServing as error:
            ended.append(error)

    async with anyio.create_task_group() as readers:
        with pytest.raises(KeyError, match="mine"):
            async with opened(worker=fixed(model=0.1, index=5.0)) as pipeline:
                readers.start_soon(read, pipeline)
                await anyio.sleep(1)
                raise KeyError("mine")
        assert anyio.current_time() == pytest.approx(5), "the search was waited for"
        assert not pipeline.live_sessions
    assert len(ended) == 1


async def test_a_refusal_that_the_body_does_not_catch_comes_out_as_it_is() -> None:
    with pytest.raises(Overloaded):
        async with opened(limits=Limits(sessions=1, waiting=0)) as pipeline, pipeline.session(PROMPT):
            await pipeline.complete(PROMPT)


async def test_cancelled_from_outside() -> None:
    """Everything ends at once, but for the calls that are running."""
    before = asyncio.all_tasks()
    with anyio.move_on_after(1) as scope:
        async with (
            opened(worker=fixed(model=0.1, index=0.25, encoder=0.02)) as pipeline,
            anyio.create_task_group() as callers,
        ):
            for n in range(5):
                callers.start_soon(exact, pipeline, f"{n} 4", LONG)
    assert scope.cancelled_caught
    assert anyio.current_time() < 1 + 0.3
    assert not pipeline.live_sessions and asyncio.all_tasks() == before


@pytest.mark.parametrize("times", [0, 1, 2, 3], ids=["scope", "task", "task twice", "task three times"])
def test_the_pipelines_program_is_cut_at_every_suspension(times: int) -> None:
    """From entering to the end of draining, by a scope or by the task's own `cancel` (again while the first one is
    being settled): no task, no session, and no stream is left."""

    async def scenario(at: int) -> bool:
        pipeline = opened(worker=fixed(model=0.01, index=0.03), output=[Lingers()])
        readers: list[asyncio.Task[None]] = []
        ends: list[object] = []

        async def read(prompt: str) -> None:
            try:
                ends.append(await pipeline.complete(prompt, max_new_tokens=20))
            except (NotServing, EngineDead) as error:
                ends.append(error)

        async def program() -> None:
            async with pipeline:
                readers.extend(asyncio.create_task(read(prompt)) for prompt in (PROMPT, "2 7", "1 8"))
                await exact(pipeline, "1 2", 2)

        def cut() -> None:
            (task if times else scope).cancel()
            for again in range(1, times):
                asyncio.get_running_loop().call_later(0.004 * again, task.cancel)

        async def main() -> None:
            with scope:
                await interrupted(program(), at, cut)

        scope = anyio.CancelScope()
        task = asyncio.get_running_loop().create_task(main())
        await asyncio.wait([task])
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert len(ends) == len(readers) and not pipeline.live_sessions and not pipeline.ready
        assert task.cancelled() or task.exception() is None
        return task.cancelled() or scope.cancelled_caught

    at = 1
    while run(scenario, at):
        at += 1
    assert at > 5


async def test_leaving_after_an_output_stage_that_drops_everything_but_the_end() -> None:
    """A stage may drop events: that costs the caller output, and nobody the way to the end."""

    class Silent(Lingers):
        async def run(self, inbox: Any, outbox: Any) -> None:
            await super().run(inbox, Through(outbox))

    class Through:
        def __init__(self, outbox: Any) -> None:
            self.outbox = outbox

        def send_nowait(self, event: Any) -> None:
            raise AssertionError("an output stage waits for room")

        async def send(self, event: Any) -> None:
            if isinstance(event, Done):
                await self.outbox.send(event)

    async with opened(output=[Silent()], limits=Limits(unread_events=2)) as pipeline:
        async with pipeline.session(PROMPT, max_new_tokens=60) as session:
            events = [event async for event in session]
        assert [type(event) for event in events] == [Done]
        assert anyio.current_time() < 60


async def test_an_output_path_that_dies_with_events_in_it_never_makes_an_answer_look_complete() -> None:
    """The session has ended well and its last events are on their way when the stage dies: an error, not `Done`."""

    class Dies(Lingers):
        async def run(self, inbox: Any, outbox: Any) -> None:
            with anyio.move_on_after(8):
                await super().run(inbox, outbox)
            raise ValueError("deadly")

    with pytest.raises(EngineDead, match="deadly"):
        async with opened(output=[Dies(seconds=2.0)]) as pipeline:
            with pytest.raises(EngineDead):
                await exact(pipeline)
            assert anyio.current_time() == pytest.approx(8)


# Many ------------------------------------------------------------------------------------------------------------


async def test_three_hundred_sessions_at_once() -> None:
    model = FakeModel(ends=False)
    model.max_batch = 16
    workers = Workers(model=0.01, index=0.03, encoder=0.001)
    async with opened(model=model, worker=workers, limits=Limits(sessions=300, waiting=0)) as pipeline:
        async with anyio.create_task_group() as callers:
            for n in range(300):
                callers.start_soon(exact, pipeline, f"{n} {n % 7} {n % 11}")
            await anyio.sleep(0.05)
            assert pipeline.live_sessions == 300
            with pytest.raises(Overloaded):
                await pipeline.complete(PROMPT)
        assert not pipeline.live_sessions
    assert len(model.forgotten) == len(set(model.forgotten)) == 300


# Real threads ----------------------------------------------------------------------------------------------------


def test_sixty_four_sessions_at_once_with_real_threads() -> None:
    async def scenario() -> None:
        async with opened(worker=ThreadWorker, limits=Limits(sessions=64)) as pipeline:
            async with anyio.create_task_group() as callers:
                for n in range(64):
                    callers.start_soon(exact, pipeline, f"{n} {n % 7} {n % 11}")
            assert not pipeline.live_sessions

    before = threading.active_count()
    anyio.run(scenario)
    assert threading.active_count() == before


class Hanging(FakeModel):
    """Its passes hang from the third on."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__(ends=False)
        self.gate = gate
        self.hangs = threading.Event()

    def forward(self, prefixes: Any) -> Any:
        if self.passes >= 3:
            self.hangs.set()
            self.gate.wait(30)
        return super().forward(prefixes)


class HangingIndex(FakeRetriever):
    def __init__(self, gate: threading.Event) -> None:
        super().__init__(documents=40)
        self.gate = gate

    def search(self, queries: Any, k: int) -> Any:
        if len(self.searches) >= 1:
            self.gate.wait(30)
        return super().search(queries, k)


@pytest.mark.parametrize("hung", ["model", "index"])
def test_a_hung_thread_call_is_the_death_of_the_engine(hung: str) -> None:
    """Everybody is told, nobody waits for the thread, and leaving takes no longer than it must."""
    gate = threading.Event()

    async def scenario() -> None:
        told = 0

        async def ask(pipeline: Pipeline, prompt: str) -> None:
            nonlocal told
            with pytest.raises(EngineDead):
                await pipeline.complete(prompt, max_new_tokens=50)
            told += 1

        model = Hanging(gate) if hung == "model" else FakeModel(ends=False)
        retriever = HangingIndex(gate) if hung == "index" else FakeRetriever(documents=40)
        limits = Limits(call_s=0.05, drain_s=0.05)
        with anyio.fail_after(5), pytest.raises(EngineDead, match=hung):
            async with opened(model=model, retriever=retriever, worker=ThreadWorker, limits=limits) as pipeline:
                async with anyio.create_task_group() as callers:
                    for prompt in (PROMPT, "2 7", "1 8"):
                        callers.start_soon(ask, pipeline, prompt)
                assert told == 3
                assert not pipeline.ready, "a thread is gone: the engine cannot serve"
                with pytest.raises(EngineDead):
                    await pipeline.complete(PROMPT)
        assert not pipeline.live_sessions
        assert asyncio.all_tasks() == {asyncio.current_task()}

    try:
        anyio.run(scenario)
    finally:
        gate.set()


def test_leaving_in_the_middle_of_a_thread_call_waits_for_it() -> None:
    gate = threading.Event()
    model = Hanging(gate)

    async def scenario() -> None:
        async with opened(model=model, worker=ThreadWorker, limits=Limits(drain_s=0.01)) as pipeline:
            async with pipeline.session(PROMPT, max_new_tokens=TOKENS):
                with anyio.fail_after(5):
                    while not model.hangs.is_set():  # noqa: ASYNC110 (a thread is waited for)
                        await anyio.sleep(0.001)
            asyncio.get_running_loop().call_later(0.05, gate.set)
        assert gate.is_set() and not pipeline.live_sessions

    anyio.run(scenario)
    assert len(model.forgotten) == 1
