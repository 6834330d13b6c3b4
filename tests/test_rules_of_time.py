"""The rules of the cycle, R11 and R12: draining, deadlines and the watchdog. See `test_rules.py`."""

import anyio
import pytest
from clocks import VirtualLoop, run
from fakes import FakeModel, Workers, fixed
from scenes import PROMPT, TOKENS, exact, expected, opened, state, until

from ralmspec.pipeline import (
    Committed,
    DeadlineExceeded,
    EngineDead,
    Limits,
    NotServing,
    Pipeline,
    Sequential,
    Stalled,
)
from ralmspec.stages.arrangement import Outlook

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
