"""The same short run on asyncio, uvloop and trio, with real threads: the outputs are the oracle's."""

import threading
from typing import Any

import anyio
import pytest
from fakes import FakeModel, FakeRetriever
from scenes import exact, expected, opened

from ralmspec.pipeline import (
    OS3,
    Answer,
    Arrangement,
    Asynchronous,
    Committed,
    DeadlineExceeded,
    Limits,
    ModelFailed,
    Sequential,
    Synchronous,
)
from ralmspec.pipeline.threads import ThreadWorker

ARRANGEMENTS: list[Arrangement] = [
    Sequential(),
    Synchronous(speculation_stride=3),
    Asynchronous(speculation_stride=1, prefetch=1),
    Asynchronous(speculation_stride=OS3(), prefetch=20),
]


@pytest.fixture(
    params=[("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})], ids=["asyncio", "uvloop", "trio"]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    if request.param[1]:
        pytest.importorskip("uvloop")
    return request.param


class Batched(FakeModel):
    """Continues up to four sessions at once, and notes its threads."""

    max_batch = 4

    def __init__(self) -> None:
        super().__init__(ends=False)
        self.threads: set[str] = set()

    def forward(self, prefixes: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        return super().forward(prefixes)


@pytest.mark.parametrize("speculation", ARRANGEMENTS, ids=repr)
async def test_outputs_are_the_oracles(speculation: Arrangement) -> None:
    model = Batched()
    pipeline = opened(model=model, speculation=speculation, worker=ThreadWorker)
    answers: dict[str, Answer] = {}

    async def ask(prompt: str) -> None:
        answers[prompt] = await pipeline.complete(prompt, max_new_tokens=23)

    async with pipeline:
        async with anyio.create_task_group() as callers:
            for prompt in ("3 1 4", "15 9 2 6", "5 3 5 8 9 7 9", "2 7 1 8", "1 4 1 4 2 1", "11 22 17 5"):
                callers.start_soon(ask, prompt)
        assert not pipeline.live_sessions
    assert model.threads == {"ralmspec-model-0"}, "never on the loop, never in two threads"
    assert {prompt: list(answer.tokens) for prompt, answer in answers.items()} == {
        prompt: expected(pipeline, prompt, 23) for prompt in answers
    }
    assert len(answers) == 6


async def test_searches_at_once_in_several_threads() -> None:
    retriever = FakeRetriever(documents=40, seed=1, spread=4)
    retriever.concurrency = 3
    async with opened(retriever=retriever, worker=ThreadWorker) as pipeline, anyio.create_task_group() as callers:
        for n in range(12):
            callers.start_soon(exact, pipeline, f"{n} {n + 1} 4")


async def test_ends_of_every_kind_leave_it_usable() -> None:
    model = Batched()
    async with opened(model=model, worker=ThreadWorker, limits=Limits(unread_events=2)) as pipeline:
        async with pipeline.session("3 1 4", max_new_tokens=2000) as session:
            await anext(session)
        with anyio.move_on_after(0.01):
            await pipeline.complete("3 1 4", max_new_tokens=3000)
        with pytest.raises(DeadlineExceeded):
            await pipeline.complete("3 1 4", max_new_tokens=3000, deadline_s=0.01)
        model.forward, fine = failing, model.forward  # type: ignore[method-assign]
        with pytest.raises(ModelFailed, match="no memory"):
            await pipeline.complete("3 1 4")
        model.forward = fine  # type: ignore[method-assign]
        await exact(pipeline)
        tokens: list[int] = []
        async with pipeline.session("2 7 1 8", max_new_tokens=40) as session:
            async for event in session:
                tokens += event.tokens if isinstance(event, Committed) else ()
        assert tokens == expected(pipeline, "2 7 1 8", 40)
        with anyio.fail_after(10):
            while pipeline.live_sessions:  # noqa: ASYNC110 (threads are waited for)
                await anyio.sleep(0.001)


async def test_the_pipeline_itself_is_cut() -> None:
    """By the program around it, while a pass is running."""
    model = Batched()
    with anyio.fail_after(10), anyio.move_on_after(0.02) as scope:
        async with opened(model=model, worker=ThreadWorker) as pipeline, anyio.create_task_group() as callers:
            for n in range(5):
                callers.start_soon(exact, pipeline, f"{n} 4", 3000)
    assert scope.cancelled_caught
    assert not pipeline.live_sessions and not pipeline.ready
    assert len(set(model.forgotten)) == 5


def failing(prefixes: Any) -> Any:
    raise MemoryError("no memory")
