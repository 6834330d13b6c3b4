"""The fault list where only real threads count, on every event loop.

Figures are those of the list, in real time; `test_faults_list.py` has the table.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import numpy as np
import pytest
from fakes import VOCABULARY, AlwaysMisses, FakeModel, FakeRetriever
from scenes import PROMPT, exact, opened, state

from ralmspec.pipeline import (
    DeadlineExceeded,
    EngineDead,
    Limits,
    ModelFailed,
    Pipeline,
)
from ralmspec.pipeline.threads import ThreadWorker
from ralmspec.stages.model import Frontier, token_by_token

LONG = 3000


@pytest.fixture(
    params=[("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})], ids=["asyncio", "uvloop", "trio"]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    if request.param[1]:
        pytest.importorskip("uvloop")
    return request.param


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    with anyio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 (threads are waited for)
            await anyio.sleep(0.001)


class Gated(FakeModel):
    """Decodes up to 64 sessions at once; waits in its thread while the gate is closed."""

    max_batch = 64

    def __init__(self) -> None:
        super().__init__(ends=False)
        self.gate = threading.Event()
        self.gate.set()
        self.inside = 0

    def forward(self, prefixes: Any) -> Any:
        self.inside = len(prefixes)
        assert self.gate.wait(30)
        self.inside = 0
        return super().forward(prefixes)


@pytest.fixture
def model() -> Iterator[Gated]:
    """No thread outlives the test behind a closed gate."""
    model = Gated()
    yield model
    model.gate.set()


def of_ours() -> Counter[str]:
    """Threads of the library, by their devices."""
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("ralmspec-")]
    return Counter(name.split("-")[1] for name in names if "lag" not in name)


# F1 to F8 on every event loop ------------------------------------------------------------------------------------


async def test_f1_f2_f3_many_at_once_are_exact() -> None:
    """As many as there are slots and places to wait, all at once; with guesses that are often, and never, right."""
    for retriever in (FakeRetriever(documents=40, seed=1, spread=4), AlwaysMisses()):
        limits = Limits(sessions=16, waiting=48)
        async with opened(retriever=retriever, worker=ThreadWorker, limits=limits) as pipeline:
            async with anyio.create_task_group() as callers:
                for n in range(64):
                    callers.start_soon(exact, pipeline, f"{n} {n % 7} {n % 11}", 8)
            await until(lambda: not pipeline.live_sessions, 1)
            assert not pipeline.waiting_sessions


async def test_f6_a_thousand_cuts_in_the_middle_of_a_pass(model: Gated) -> None:
    """Each caller is back in less than 50 ms, its pass goes on and ends; never more threads than there are devices."""
    back, cut = list[float](), 0.0
    threads: Counter[str] = Counter()

    async def caller(pipeline: Pipeline, prompt: str) -> None:
        try:
            await pipeline.complete(prompt, max_new_tokens=LONG)
        finally:
            back.append(time.monotonic() - cut)

    async with opened(model=model, worker=ThreadWorker, limits=Limits(sessions=50, waiting=0)) as pipeline:
        for _ in range(20):
            async with anyio.create_task_group() as callers:
                for n in range(50):
                    callers.start_soon(caller, pipeline, f"{n} 1 4")
                await until(lambda: pipeline.live_sessions == 50)
                model.gate.clear()
                await until(lambda: model.inside)
                threads |= of_ours()
                cut = time.monotonic()
                callers.cancel_scope.cancel()
            assert model.inside and pipeline.live_sessions >= model.inside, "a slot was free before its pass had ended"
            threads |= of_ours()
            model.gate.set()
            await until(lambda: not pipeline.live_sessions)
        await exact(pipeline)
    assert len(back) == 1000
    slowest = sorted(
        max(back[n : n + 50]) for n in range(0, 1000, 50)
    )  # of each round; the machine may be busy in a few
    assert slowest[14] < 0.05 and slowest[-1] < 5, slowest
    assert threads == {"encoder": 1, "index": 1, "model": 1, "prefetch": 1}


async def test_f7_cuts_before_the_first_token_keep_nothing(model: Gated) -> None:
    async with opened(model=model, worker=ThreadWorker, limits=Limits(sessions=4, waiting=8)) as pipeline:
        for turns in range(30):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as callers:
                    for n in range(12):
                        callers.start_soon(pipeline.complete, f"{n} {turns}")
                    for _ in range(turns):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
            await until(lambda: not pipeline.live_sessions, 1)
            assert not pipeline.waiting_sessions
        await exact(pipeline)
    assert len(model.forgotten) == len(set(model.forgotten)), "an id was used twice"


async def test_f8_a_late_token_reaches_nobody(model: Gated) -> None:
    async with opened(model=model, worker=ThreadWorker) as pipeline:
        model.gate.clear()
        async with pipeline.session(PROMPT) as stream:
            await until(lambda: model.inside)
        session = state(stream)
        model.gate.set()
        await until(lambda: not pipeline.live_sessions)
        assert session.statistics.wasted_tokens == 1 and not session.transcript.committed
        await exact(pipeline)


# F11 to F13 ------------------------------------------------------------------------------------------------------


class Broken(Gated):
    """Fails as told, at every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.how = ""

    def forward(self, prefixes: Any) -> Any:
        if self.how == "memory":
            raise MemoryError("out of memory")
        if self.how == "NaN":
            return [token_by_token(prefix, lambda tokens: Frontier(np.full(VOCABULARY, np.nan))) for prefix in prefixes]
        if self.how == "panic":
            raise Panic("deadly")
        return super().forward(prefixes)


class Panic(BaseException):
    """What a crash in a native library may raise."""


@pytest.mark.parametrize("how", ["memory", "NaN"])
async def test_f11_after_a_failed_pass_the_next_request_is_served(how: str) -> None:
    """Within a second, and nothing is kept for the one that failed."""
    model = Broken()
    async with opened(model=model, worker=ThreadWorker) as pipeline:
        for _ in range(3):
            model.how = how
            with pytest.raises(ModelFailed):
                await pipeline.complete(PROMPT)
            model.how = ""
            with anyio.fail_after(1):
                await exact(pipeline)
            await until(lambda: not pipeline.live_sessions, 1)
        assert len(set(model.forgotten)) == len(model.forgotten) == 6


async def test_f12_a_death_is_told_to_everybody_within_a_second() -> None:
    model, told = Broken(), list[float]()

    async def caller(pipeline: Pipeline, prompt: str) -> None:
        with pytest.raises(EngineDead):
            await pipeline.complete(prompt, max_new_tokens=LONG)
        told.append(time.monotonic())

    died = 0.0
    with pytest.raises(BaseException) as death:
        async with anyio.create_task_group() as callers, opened(model=model, worker=ThreadWorker) as pipeline:
            for n in range(64 + 20):  # some of them wait for a slot
                callers.start_soon(caller, pipeline, f"{n} 1 4")
            await until(lambda: pipeline.waiting_sessions == 20)
            died, model.how = time.monotonic(), "panic"
            await until(lambda: not pipeline.ready)
            with pytest.raises(EngineDead):
                await pipeline.complete(PROMPT)
            await until(lambda: len(told) == 84)
    assert any(isinstance(leaf, Panic | EngineDead) for leaf in leaves(death.value))
    assert len(told) == 84 and max(told) - died < 1
    assert not pipeline.live_sessions and not pipeline.waiting_sessions and not pipeline.ready


def leaves(error: BaseException) -> list[BaseException]:
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return [error, *(leaf for part in inner for leaf in leaves(part))]


async def test_f13_deadlines_hold_while_a_thread_hangs_and_leaving_says_so(model: Gated) -> None:
    """The caller is told within 100 ms; the hung call is named, and leaving takes no longer than it may."""
    model.gate.clear()
    limits = Limits(call_s=0.6, drain_s=0.6)
    with pytest.raises(EngineDead, match="model"):
        async with opened(model=model, worker=ThreadWorker, limits=limits) as pipeline:
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await pipeline.complete(PROMPT, deadline_s=0.2)
            assert 0.2 <= time.monotonic() - began < 0.3
            assert pipeline.live_sessions == 1, "its pass is not home"
            left = time.monotonic()
    assert time.monotonic() - left < 0.6 + 0.5
    assert not pipeline.live_sessions


# F20 -------------------------------------------------------------------------------------------------------------


class Stops(FakeModel):
    """Its tokenizer holds the loop up for 200 ms, once."""

    def __init__(self) -> None:
        super().__init__(ends=False)
        self.calls = 0

    def decode(self, tokens: Any) -> str:
        if threading.current_thread() is threading.main_thread():
            self.calls += 1
            if self.calls == 12:
                threading.Event().wait(0.2)
        return super().decode(tokens)


async def test_f20_a_blocked_loop_is_named_within_a_second_and_outputs_are_exact(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the default limits, in the middle of many sessions."""
    with caplog.at_level(logging.WARNING, "ralmspec"):
        async with opened(model=Stops(), worker=ThreadWorker) as pipeline, anyio.create_task_group() as callers:
            for n in range(8):
                callers.start_soon(exact, pipeline, f"{n} 1 4")
    told = [record.getMessage() for record in caplog.records if "Stops.decode" in record.getMessage()]
    assert len(told) == 1 and "CycleStage._serve" in told[0], caplog.text
