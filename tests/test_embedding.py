"""The pipeline inside an asyncio program that knows nothing of anyio: task groups, timeouts and native cancellation.

These tests are pytest-asyncio's. The anyio plugin would ask for its `anyio_backend` fixture in every async test, and so
run each of them once for every backend; the fixture below leaves one.
"""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from fakes import FakeModel
from scenes import PROMPT, TOKENS, exact, expected, opened

from ralmspec.pipeline import Committed, Done, EngineDead, Event, Limits, NotServing, Pipeline
from ralmspec.pipeline.threads import ThreadWorker

LONG = 3000
pytestmark = pytest.mark.asyncio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Gated(FakeModel):
    """Stops in its thread, before every pass, while the gate is closed."""

    def __init__(self) -> None:
        super().__init__(ends=False)
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, prefixes: Any) -> Any:
        assert self.gate.wait(10)
        return super().forward(prefixes)


def serving(model: Any = None, limits: Limits | None = None) -> Pipeline:
    """With real threads."""
    return opened(model=model, limits=limits, worker=ThreadWorker)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (threads are waited for)
            await asyncio.sleep(0.001)


async def emptied(pipeline: Pipeline) -> None:
    """Everything that was cut comes home soon, and the pipeline is as good as new."""
    await until(lambda: not pipeline.live_sessions)
    await exact(pipeline)
    assert pipeline.ready


async def read(pipeline: Pipeline, events: list[Event], max_new_tokens: int = LONG) -> None:
    async with pipeline.session(PROMPT, max_new_tokens=max_new_tokens) as session:
        async for event in session:
            events.append(event)  # noqa: PERF401 (what came before a cut counts)


def reached(events: list[Event], number: int) -> bool:
    return len(events) >= number


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, Committed) for token in event.tokens]


async def test_each_test_here_runs_once_and_on_pytest_asyncio(request: pytest.FixtureRequest) -> None:
    assert "[" not in request.node.name
    task = asyncio.current_task()
    assert task is not None and "anyio" not in repr(task.get_coro())


async def test_sessions_in_the_tasks_of_a_task_group() -> None:
    async with serving() as pipeline:
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(exact(pipeline, f"{n} {n} 4")) for n in range(20)]
        assert all(len(answer.result().tokens) == TOKENS for answer in answers)
        assert not pipeline.live_sessions


async def test_the_pipeline_may_live_in_a_task_of_its_own() -> None:
    started: asyncio.Future[Pipeline] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()

    async def serve() -> None:
        async with serving() as pipeline:
            started.set_result(pipeline)
            await stop.wait()

    server = asyncio.create_task(serve())
    pipeline = await started
    await asyncio.gather(exact(pipeline), exact(pipeline, "2 7"))
    stop.set()
    await server
    assert not pipeline.ready
    with pytest.raises(NotServing):
        await pipeline.complete(PROMPT)


async def test_a_timeout_around_a_session() -> None:
    model = Gated()
    async with serving(model) as pipeline:
        events: list[Event] = []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await read(pipeline, events)
        assert tokens_of(events) == expected(pipeline, max_new_tokens=LONG)[: len(tokens_of(events))]
        await emptied(pipeline)


async def test_a_timeout_in_the_middle_of_a_pass() -> None:
    """The caller is let go at once; the slot only when the pass has ended."""
    model = Gated()
    async with serving(model, Limits(sessions=1)) as pipeline:
        model.gate.clear()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await pipeline.complete(PROMPT)
        assert pipeline.live_sessions == 1
        model.gate.set()
        await emptied(pipeline)


async def test_a_readers_task_is_cancelled() -> None:
    async with serving() as pipeline:
        for wait_for in (0, 1, 2, 5, 20):
            events: list[Event] = []
            reader = asyncio.create_task(read(pipeline, events))
            await until(partial(reached, events, wait_for))
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            assert not any(isinstance(event, Done) for event in events)
            assert tokens_of(events) == expected(pipeline, max_new_tokens=LONG)[: len(tokens_of(events))]
            await emptied(pipeline)


async def test_a_cancelled_task_group_takes_all_its_sessions_with_it() -> None:
    async with serving() as pipeline:
        with pytest.raises(ExceptionGroup, match="unhandled"):
            async with asyncio.TaskGroup() as group:
                for _ in range(10):
                    group.create_task(read(pipeline, []))
                await asyncio.sleep(0.01)
                raise ValueError("a sibling failed")
        await emptied(pipeline)


async def test_the_program_is_cancelled_while_the_pipeline_serves() -> None:
    entered = asyncio.Event()

    async def program() -> None:
        async with serving() as pipeline, asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(read(pipeline, []))
            entered.set()

    task = asyncio.create_task(program())
    await entered.wait()
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_the_program_is_cancelled_while_the_pipeline_drains() -> None:
    """The second Ctrl-C: draining is cut short, and still nothing is left running (`conftest.py` looks for threads)."""
    model = Gated()
    pipelines: list[Pipeline] = []
    events: list[Event] = []

    async def program() -> None:
        async with serving(model) as pipeline:
            pipelines.append(pipeline)
            asyncio.get_running_loop().create_task(reader(pipeline))
            await until(lambda: events)

    ends: list[BaseException] = []

    async def reader(pipeline: Pipeline) -> None:
        try:
            await read(pipeline, events)
        except (NotServing, EngineDead) as error:
            ends.append(error)

    task = asyncio.create_task(program())
    await until(lambda: pipelines and not pipelines[0].ready)
    await asyncio.sleep(0.01)
    assert not task.done(), "it drains"
    task.cancel()
    with pytest.raises((asyncio.CancelledError, EngineDead)):
        await task
    await until(lambda: len(asyncio.all_tasks()) == 1)
    assert len(ends) == 1 and not pipelines[0].live_sessions


async def test_beside_other_work_of_the_loop() -> None:
    """The host's own callbacks go on while the pipeline serves."""
    ticks = 0
    done = asyncio.Event()

    async def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            await asyncio.sleep(0)

    async with serving() as pipeline:
        host = asyncio.create_task(tick())
        await exact(pipeline, max_new_tokens=60)
        done.set()
        await host
    assert ticks > 60
