"""The fault list, F17 and F21: deadlines at every instant, and clocks that jump. See `test_faults_list.py`."""

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from clocks import ShuffledLoop, run
from fakes import Arguments, Result, VirtualWorker, Workers
from scenes import PROMPT, exact, opened, until

from ralmspec.pipeline import (
    DeadlineExceeded,
    EngineDead,
    Limits,
    Pipeline,
)
from ralmspec.stages.cycle import CycleStage
from ralmspec.stages.errors import WorkerLost
from ralmspec.stages.session import Session


def test_f17_no_work_begins_after_the_deadline() -> None:
    """The deadline is put before, into and after every piece of work of a session, and onto the very instants at which
    one ends and the next begins: it ends with one error, in time, and no stage takes work from it any more."""
    begun: list[tuple[float, float]] = []

    def noted(take: Any) -> Any:
        def watched(self: Any, session: Session, turn: Any) -> Any:
            work = take(self, session, turn)
            if work is not None:
                begun.append((anyio.current_time(), session.request.deadline))
            return work

        return watched

    async def scenario(deadline_s: float, lag_s: float) -> list[float]:
        workers = Workers(model=0.1, index=0.25, encoder=0.05, prefetch=0.05)
        error: BaseException | None = None
        loop: Any = asyncio.get_running_loop()
        async with opened(worker=workers) as pipeline:
            if lag_s:  # the loop is busy when the deadline comes: timer and turns are late together

                def busy() -> None:
                    loop.clock.now += lag_s

                loop.call_later(deadline_s - lag_s / 2, busy)
            try:
                await pipeline.complete(PROMPT, max_new_tokens=8, deadline_s=deadline_s)
            except DeadlineExceeded as late:
                error = late
            if deadline_s < float("inf"):
                assert error is not None
                took = anyio.current_time() - deadline_s - lag_s  # shuffled loops let time pass anywhere
                assert -lag_s - 1e-9 <= took <= (0.1 if isinstance(loop, ShuffledLoop) else 0.0011)
            await until(lambda: not pipeline.live_sessions)
        return [instant for worker in workers.made.values() for call in worker.log for instant in call]

    with pytest.MonkeyPatch.context() as patch:
        for stage in CycleStage.__subclasses__():
            patch.setattr(stage, "take", noted(stage.take))
        instants = sorted(set(run(scenario, float("inf"), 0.0)))
        assert len(instants) > 12
        begun.clear()
        for instant in instants:
            for offset in (-0.01, -1e-6, 0.0, 1e-6, 0.01):
                for seed in (None, 1, 2):
                    if 0 < instant + offset < instants[-1] - 0.02:
                        run(scenario, instant + offset, 0.0 if offset else 0.02, seed=seed)
    assert len(begun) > 500
    assert not [when for when, deadline in begun if when >= deadline]


class Steady(VirtualWorker):
    """Its calls go on after a jump of the clock as if nothing had been, and can be given up at any time."""

    async def call(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        self._begun.append(start := anyio.current_time())
        try:
            with anyio.CancelScope(shield=True):
                for _ in range(10):
                    await anyio.sleep(self.delay(self.name) / 10)
                    if self._abandoned.is_set():
                        raise WorkerLost(f"the call to {self.name} was given up")
            return work(*arguments)
        finally:
            self._begun.remove(start)


def test_f21_a_clock_that_jumps_moves_only_deadlines() -> None:
    """Ten minutes are lost again and again, as when a machine was suspended: calls and sessions are not taken for hung,
    though both limits are shorter. Only a deadline that lay in such a gap has passed."""
    seconds = {"model": 0.1, "index": 0.25, "encoder": 0.02}

    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        async with opened(
            worker=lambda name, threads: Steady(name, lambda name: seconds.get(name, 0.0)),
            limits=Limits(call_s=5, stall_s=3),
        ) as pipeline:
            for _ in range(6):
                async with anyio.create_task_group() as callers:
                    for prompt in ("3 1 4", "2 7 1 8", "5 3 5"):
                        callers.start_soon(exact, pipeline, prompt)
                    callers.start_soon(misses, pipeline)
                    await anyio.sleep(0.43)
                    loop.clock.now += 600
                assert pipeline.ready

    async def misses(pipeline: Pipeline) -> None:
        with pytest.raises(DeadlineExceeded):
            await pipeline.complete("1 1", max_new_tokens=400, deadline_s=300)

    run(scenario)
    for seed in range(20):
        run(scenario, seed=seed)


def test_f21_what_hangs_after_a_jump_is_still_found() -> None:
    async def scenario() -> None:
        loop: Any = asyncio.get_running_loop()
        workers = Workers(model=0.1, index=0.25)
        with pytest.raises(EngineDead, match="index"):
            async with opened(worker=workers, limits=Limits(call_s=5, stall_s=3)) as pipeline:
                workers.seconds["index"] = float("inf")
                with pytest.raises(EngineDead):
                    async with pipeline.session(PROMPT) as session:
                        await until(lambda: workers["index"].running)
                        loop.clock.now += 600
                        async for _ in session:
                            pass
                assert 604 < anyio.current_time() < 607

    run(scenario)
