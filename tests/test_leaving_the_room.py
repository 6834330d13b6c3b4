"""Every way out of the waiting room but a slot: cuts, `cancel`, draining, death (R1, R11). See `test_admission.py`."""

import asyncio
from typing import Any

import anyio
import pytest
from clocks import interrupted, run
from fakes import fixed
from faults import deadly
from scenes import PROMPT, exact, opened, until
from test_admission import served

from ralmspec.pipeline import (
    Cancelled,
    Done,
    EngineDead,
    Limits,
    NotServing,
    Pipeline,
    SessionStream,
)
from ralmspec.pipeline.admission import Admission
from ralmspec.stages.verify import Verify


@pytest.mark.parametrize("way", ["scope", "task", "cancel()"])
def test_a_cut_at_every_suspension_leaves_nothing_in_the_room(way: str) -> None:
    """One slot, taken for a second; the victim waits before a bystander, and is cut at every moment since entering."""
    for seed in (None, *range(20)):
        at = 1
        while not run(cut_in_the_room, way, at, seed=seed):
            at += 1
        assert at > 3, "the victim was hardly ever suspended"


async def cut_in_the_room(way: str, at: int) -> bool:
    pipeline, stream, ends = opened(limits=Limits(sessions=1, waiting=2)), list[SessionStream](), list[Any]()
    suspensions = at

    async def victim() -> None:
        stream.append(pipeline.session("2 7 1 8", max_new_tokens=4))
        async with stream[0]:
            async for event in stream[0]:
                ends.extend([event] if isinstance(event, Done) else [])

    def cut() -> None:
        if way == "cancel()":
            stream[0].cancel()
        else:
            (scope if way == "scope" else task).cancel()

    async def run_victim() -> None:
        nonlocal suspensions
        with scope:
            try:
                suspensions = await interrupted(victim(), at, cut)
            except Cancelled as error:
                ends.append(error)

    async with pipeline:
        scope = anyio.CancelScope()
        async with anyio.create_task_group() as others, pipeline.session(PROMPT):
            task = asyncio.create_task(run_victim())
            await until(lambda: pipeline.waiting_sessions or task.done())
            others.start_soon(exact, pipeline, "5 3 5", 4)
            await anyio.sleep(1)
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None
        await exact(pipeline, "3 1", 2)
        await until(lambda: not pipeline.live_sessions)
        assert not pipeline.waiting_sessions and len(ends) <= 1
    return suspensions < at


def test_the_first_in_the_room_may_be_cut_in_the_moment_in_which_it_is_called() -> None:
    """Then the next one is called instead; after a scope's cancel, which lets the first begin and end, afterwards."""

    async def scenario(native: bool) -> None:
        begun: list[str] = []
        pipeline = opened(limits=Limits(sessions=1))
        call_first, scope = Admission._call_first, anyio.CancelScope()

        def called_and_cut(self: Admission) -> None:
            call_first(self)
            if self._places and self._places[0].called.is_set() and not task.done():
                (task if native else scope).cancel()

        async def victim() -> None:
            with scope:
                await served(pipeline, begun, "1 1")

        async with pipeline, anyio.create_task_group() as callers:
            async with pipeline.session(PROMPT):
                task = asyncio.create_task(victim())
                await until(lambda: pipeline.waiting_sessions == 1)
                callers.start_soon(served, pipeline, begun, "2 7")
                await until(lambda: pipeline.waiting_sessions == 2)
                patch.setattr(Admission, "_call_first", called_and_cut)
            await asyncio.wait([task])
            await until(lambda: "2 7" in begun)
        assert begun == ["2 7"] if native else ["1 1", "2 7"]

    for native in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            run(scenario, native)


def test_draining_tells_who_waits_at_once() -> None:
    async def scenario() -> None:
        async with anyio.create_task_group() as callers:
            async with opened(limits=Limits(sessions=1), worker=fixed(model=1.0, index=1.0)) as pipeline:
                callers.start_soon(exact, pipeline, PROMPT, 8)
                await anyio.sleep(0.01)
                for n in range(3):
                    callers.start_soon(told, pipeline, NotServing, 0.5, f"{n} 1")
                await anyio.sleep(0.49)
                assert pipeline.waiting_sessions == 3
            assert not pipeline.waiting_sessions and anyio.current_time() > 8

    run(scenario)


def test_a_death_tells_who_waits_at_once() -> None:
    """Also where no slot is free yet, because a call of a minute is still running."""

    async def scenario() -> None:
        pipeline = opened(limits=Limits(sessions=2), worker=fixed(model=60.0, index=0.25))
        with pytest.raises(EngineDead):
            async with pipeline, anyio.create_task_group() as callers:
                callers.start_soon(told, pipeline, EngineDead, 1.0, PROMPT)
                await anyio.sleep(1)
                for n in range(3):
                    callers.start_soon(told, pipeline, EngineDead, 1.0, f"{n} 1")
        assert anyio.current_time() == pytest.approx(60.25)

    with deadly(Verify, 4, False):
        run(scenario)


async def told(pipeline: Pipeline, error: type[Exception], at: float, prompt: str) -> None:
    with pytest.raises(error):
        await pipeline.complete(prompt)
    assert anyio.current_time() == pytest.approx(at, abs=0.1)


def test_a_stream_is_entered_once_also_while_it_waits() -> None:
    async def scenario() -> None:
        pipeline = opened(limits=Limits(sessions=1))
        async with pipeline, anyio.create_task_group() as callers, pipeline.session(PROMPT):
            stream = pipeline.session("2 7")
            callers.start_soon(enter, stream)
            await until(lambda: pipeline.waiting_sessions)
            with pytest.raises(RuntimeError, match="once"):
                await stream.__aenter__()
            stream.cancel()
            await until(lambda: not pipeline.waiting_sessions)

    async def enter(stream: SessionStream) -> None:
        with pytest.raises(Cancelled, match="before it began"):
            await stream.__aenter__()

    run(scenario)
