"""The fault list, F1 to F28 as far as sessions meet them, with the figure that each is measured by: virtual time.

What other files hold already stands there; those that end in `for_real` and `of_processes` are in real time:

| fault | what is promised | where |
|---|---|---|
| F1 random schedules | outputs are the oracle's | `test_schedules.test_random_schedules_with_faults` |
| F2 rollback storm | it ends, nothing overflows | `test_schedules.test_a_rollback_storm_ends`, `test_f2_...` here |
| F3 queues of the exact bound | enough; one less is noticed | `test_rules.test_r7_...`, `test_mutants` (R7) |
| F4 a cut at every suspension | nothing kept | `test_schedules`, `test_leaving_the_room`, `test_f4_...` here |
| F5 5 % cancels, 2 % faults | the rest exact, nothing leaks | `test_f5_...` here |
| F6 a cut during a call | the caller returns, the call ends | `test_threads`, `test_faults_for_real` |
| F7 a cut before the first token | nothing kept | `test_rules.test_r1_a_slot_...`, `test_faults_for_real` |
| F8 late results | dropped as stale | `test_rules.test_r4_...`, `test_f8_...` here |
| F9 the retriever raises | bounded retry, then each alone | `test_retrying`, `test_faults_of_knowledge` |
| F10 the retriever answers nonsense | typed failure, no death | `test_faults_of_knowledge` |
| F11 the model raises | each alone, memory is freed | `test_rules_of_faults`, `test_faults_for_real` |
| F12 a stage dies | everybody is told, the process fails | `test_faults_for_real`, `test_faults_of_processes` |
| F13 a call hangs | deadlines hold, leaving ends | `test_rules_of_time`, `test_shutdown`, `test_faults_for_real` |
| F17 deadlines | no work is begun after one | `test_rules_of_time`, `test_admission`, `test_faults_of_time` |
| F18 SIGTERM | drained in order and in time | `test_faults_of_processes` |
| F20 a blocked loop | named; outputs exact | `test_lag_alarm`, `test_faults_for_real` |
| F21 clocks | only deadlines move | `test_schedules` (time passes anywhere), `test_faults_of_time` |
| F27 backends | the same on each | `test_backends`, `test_faults_for_real` |
| F28 mutants | all are noticed | `test_mutants` |

`RALMSPEC_SESSIONS=100000` makes the figures those of the list; without it, tests that simulate many take a tenth.
"""

import asyncio
import gc
import logging
import tracemalloc
from collections import Counter
from typing import Any

import anyio
import pytest
from clients import Luck
from clocks import interrupted, run
from fakes import AlwaysMisses, Workers, fixed
from scenes import PROMPT, exact, expected, opened, until
from simulation import Eager, simulate
from test_schedules import SESSIONS

from ralmspec.pipeline import (
    Cancelled,
    Committed,
    Done,
    Limits,
    Pipeline,
    SessionStream,
)
from ralmspec.stages.messages import Decoded, Pass
from ralmspec.stages.session import Session


def test_f2_storms_of_rollbacks_end_without_an_overflow() -> None:
    """No guess is ever right, everybody comes at once and waits for a slot: at most a rollback a step."""
    stormy = Eager(window=8, flights=2)

    async def storm(sessions: int) -> None:
        async with (
            opened(retriever=AlwaysMisses(), speculation=stormy, limits=Limits(sessions=32, waiting=sessions)) as pipe,
            anyio.create_task_group() as callers,
        ):
            for n in range(sessions):
                callers.start_soon(drenched, pipe, f"{n} {n % 7}")

    async def drenched(pipeline: Pipeline, prompt: str) -> None:
        answer = await pipeline.complete(prompt, max_new_tokens=6)
        assert answer.statistics.rollbacks == 2  # of three steps the first is not guessed
        done[tuple(answer.tokens) == tuple(expected(pipeline, prompt, 6))] += 1

    done: Counter[bool] = Counter()
    for seed in range(max(1, SESSIONS // 1000)):
        run(storm, 100, seed=seed)
    assert done == {True: 100 * max(1, SESSIONS // 1000)}


@pytest.mark.parametrize("way", ["scope", "task", "cancel()"])
def test_f4_twenty_schedules_of_every_cut(way: str) -> None:
    """The victim is cut at its k-th suspension, for every k: a prefix of the truth, and everything comes home."""

    async def scenario(at: int) -> bool:
        pipeline = opened(limits=Limits(sessions=2, waiting=2, unread_events=2), worker=fixed(model=0.01, index=0.03))
        stream: list[SessionStream] = []
        seen, ends, suspensions = list[int](), list[Any](), at

        async def victim() -> None:
            stream.append(pipeline.session(PROMPT, max_new_tokens=7))
            async with stream[0]:
                async for event in stream[0]:
                    seen.extend(event.tokens if isinstance(event, Committed) else ())
                    ends.extend([event] if isinstance(event, Done) else [])

        async def run_victim() -> None:
            nonlocal suspensions
            with scope:
                try:
                    suspensions = await interrupted(victim(), at, cut)
                except Cancelled as error:
                    ends.append(error)

        def cut() -> None:
            if way == "cancel()":
                stream[0].cancel()
            else:
                (scope if way == "scope" else task).cancel()

        async with pipeline:
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as others:
                others.start_soon(exact, pipeline, "2 7", 7)
                others.start_soon(exact, pipeline, "1 8", 7)
                await anyio.lowlevel.checkpoint()
                task = asyncio.create_task(run_victim())
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None
            await exact(pipeline, "5 3", 3)
            await until(lambda: not pipeline.live_sessions)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        truth = expected(pipeline, PROMPT, 7)
        assert seen == truth[: len(seen)] and len(ends) <= 1
        assert not ends or isinstance(ends[0], Cancelled) or seen == truth
        return suspensions < at

    for seed in range(20):
        at = 1
        while not run(scenario, at, seed=seed):
            at += 1
        assert at > 6


def test_f5_cancels_and_faults_leak_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """5 % cancels, 2 % faults: what is not hit is exact, and memory stays below 16 bytes a session.

    The same runs are made three times, since models, oracle and interpreter remember what they have seen.
    """
    caplog.set_level(logging.ERROR, "ralmspec.stages")  # what is logged is kept by the test runner
    seeds = range(500_000, 500_000 + max(6, SESSIONS // 1500))

    def once() -> Counter[str]:
        tally: Counter[str] = Counter()
        for seed in seeds:
            tally += simulate(Luck(seed=seed, cancels=0.05, faults=0.02, dies=False, drains=False))
        return tally

    def kept() -> int:
        """Bytes that are still held, but for what the fakes note down."""
        gc.collect()
        ours = [tracemalloc.Filter(False, f"*/{name}") for name in ("tests/*.py", "tracemalloc.py")]
        return sum(line.size for line in tracemalloc.take_snapshot().filter_traces(ours).statistics("filename"))

    tally = once()
    assert tally["completed"] > 0.7 * tally["sessions"] and tally["cancelled"] and tally["faults"]
    tracemalloc.start()
    try:
        once()
        before = kept()
        again = once()
        growth = kept() - before
    finally:
        tracemalloc.stop()
    assert growth < 16 * again["sessions"], f"{growth} bytes after {again['sessions']} sessions"


def test_f8_late_results_are_dropped_and_counted() -> None:
    """A hundred sessions are cancelled while their pass is running: each brings one token that nobody gets."""
    late: list[int] = []
    decoded = Session.decoded

    def watched(session: Session, made: Pass, brought: Decoded, seconds: float) -> None:
        before = len(session.transcript.committed), len(session.transcript.context)
        decoded(session, made, brought, seconds)
        if session.is_stale(made.epoch):
            late.append(session.id)
            assert before == (len(session.transcript.committed), len(session.transcript.context))

    async def scenario() -> None:
        workers = Workers(model=0.1, index=0.05)
        async with opened(limits=Limits(sessions=8, waiting=0), worker=workers) as pipeline:
            for n in range(100):
                async with pipeline.session(f"{n} 1") as session:
                    await until(lambda: workers["model"].running)
                    cancelled.append(session.id)
                await until(lambda: not pipeline.live_sessions)
            await exact(pipeline)

    cancelled: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "decoded", watched)
        run(scenario)
    assert [id for id in late if id in set(cancelled)] == cancelled and len(set(cancelled)) == 100
