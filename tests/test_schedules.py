"""The oracle under seeded random schedules: whatever order things happen in, whatever fails, outputs are exact.

`RALMSPEC_SESSIONS` sets how many sessions are simulated (10,000 unless said). A failing run names its seed:
`simulate(Luck(seed=...))` repeats it.
"""

import asyncio
import math
import os
from collections import Counter
from typing import Any

import anyio
import pytest
from clients import Luck
from clocks import interrupted, run
from fakes import AlwaysMisses, FakeModel, FakeRetriever, VirtualWorker
from oracle import sequential
from simulation import Eager, simulate

from ralmspec.pipeline import (
    Arrangement,
    Asynchronous,
    Cancelled,
    Committed,
    Done,
    InContext,
    Limits,
    Pipeline,
    Sequential,
    SessionStream,
    Synchronous,
)

SESSIONS = int(os.environ.get("RALMSPEC_SESSIONS", "10000"))
BLOCK = 2500
TALLY: Counter[str] = Counter()
"""What happened in all simulated sessions of this process."""


@pytest.mark.parametrize("block", range(math.ceil(SESSIONS / BLOCK)))
def test_random_schedules_with_faults(block: int) -> None:
    tally: Counter[str] = Counter()
    wanted = min(BLOCK, SESSIONS - block * BLOCK)
    seed = 1_000_000 * block
    while tally["sessions"] < wanted:
        seed += 1
        try:
            tally += simulate(Luck(seed=seed))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    TALLY.update(tally)
    if wanted == BLOCK:
        assert tally["completed"] >= BLOCK // 2 and tally["rollbacks"] >= BLOCK // 4, tally


def test_the_random_schedules_were_not_vacuous() -> None:
    """Everything that should have happened did, in all of the runs before together."""
    if TALLY["sessions"] < 3 * BLOCK:
        pytest.skip(f"only {TALLY['sessions']} sessions were simulated in this process")
    wanted = ["rollbacks", "stale", "completed", "cut", "cancelled", "slow", "overloaded", "faults", "deaths", "drains"]
    wanted += ["ended in the waiting room", "certified", "stretches", "certified in stretches"]
    wanted += ["DeadlineExceeded", "Cancelled", "RetrieverFailed", "ModelFailed", "EngineDead", "NotServing"]
    assert not [what for what in wanted if not TALLY[what]], TALLY


ARRANGEMENTS: dict[str, Arrangement] = {
    "sequential": Sequential(),
    "synchronous": Synchronous(speculation_stride=3, prefetch=1),
    "asynchronous": Asynchronous(speculation_stride=2, prefetch=20),
    "eager": Eager(window=3),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
def test_a_rollback_storm_ends(arrangement: Arrangement) -> None:
    """No guess is ever right, everybody is there at once: at most one rollback for each step, and all exact."""

    async def storm() -> list[Any]:
        model, retriever = FakeModel(ends=False), AlwaysMisses()
        workers = 0.01, 0.02
        answers: list[Any] = []
        async with (
            Pipeline(
                model=model,
                retriever=retriever,
                workload=InContext(retrieval_stride=2),
                speculation=arrangement,
                limits=Limits(sessions=32),
                worker=lambda name, threads: VirtualWorker(name, lambda name: workers[name == "index"]),
            ) as pipeline,
            anyio.create_task_group() as clients,
        ):

            async def ask(prompt: str) -> None:
                answers.append((prompt, await pipeline.complete(prompt, max_new_tokens=12)))

            for n in range(32):
                clients.start_soon(ask, f"{n} {n * n} {n + 3}")
        for prompt, answer in answers:
            tokens, _ = sequential(model, retriever, model.encode(prompt), max_new_tokens=12, retrieval_stride=2)
            assert list(answer.tokens) == tokens
        return answers

    for seed in range(6):
        answers = run(storm, seed=seed)
        rollbacks = [answer.statistics.rollbacks for _, answer in answers]
        wrong = 0 if isinstance(arrangement, Sequential) else 5  # of 6 steps the first one is not guessed
        assert rollbacks == [wrong] * 32


@pytest.mark.parametrize("arrangement", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
@pytest.mark.parametrize("way", ["scope", "task", "cancel()"])
def test_cancel_at_every_suspension(way: str, arrangement: Arrangement) -> None:
    """One client is cut at its k-th suspension, for every k; beside it others, whose answers stay exact."""
    model, retriever = FakeModel(ends=False), FakeRetriever(documents=40, seed=1, spread=4)
    prompts = ("3 1 4", "2 7 1 8", "5 3 5 8 9 7 9")
    expected = {
        prompt: sequential(model, retriever, model.encode(prompt), max_new_tokens=7, retrieval_stride=2)[0]
        for prompt in prompts
    }

    async def cut(at: int) -> bool:
        pipeline = Pipeline(
            model=model,
            retriever=retriever,
            workload=InContext(retrieval_stride=2),
            speculation=arrangement,
            limits=Limits(sessions=3, unread_events=2),
            worker=lambda name, threads: VirtualWorker(name, lambda name: 0.01 + 0.02 * (name == "index")),
        )
        seen: list[int] = []
        ends: list[Any] = []
        suspensions = at
        stream: SessionStream | None = None

        async def victim() -> None:
            nonlocal stream
            stream = pipeline.session(prompts[0], max_new_tokens=7)
            async with stream:
                async for event in stream:
                    if isinstance(event, Committed):
                        seen.extend(event.tokens)
                    elif isinstance(event, Done):
                        ends.append(event)

        def act() -> None:
            if way == "scope":
                scope.cancel()
            elif way == "task":
                task.cancel()
            elif stream is not None:
                stream.cancel()

        async def bystander(prompt: str) -> None:
            answer = await pipeline.complete(prompt, max_new_tokens=7)
            assert list(answer.tokens) == expected[prompt]

        async def run_victim() -> None:
            nonlocal suspensions
            with scope:
                try:
                    suspensions = await interrupted(victim(), at, act)
                except Cancelled as error:
                    ends.append(error)

        async with pipeline:
            scope = anyio.CancelScope()
            task = asyncio.create_task(run_victim())
            async with anyio.create_task_group() as others:
                for prompt in prompts[1:]:
                    others.start_soon(bystander, prompt)
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None
            # Everything comes home without being drained: the bystanders and one newcomer find all three slots.
            await bystander(prompts[1])
            assert not pipeline.live_sessions
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert seen == expected[prompts[0]][: len(seen)]
        assert len(ends) <= 1 and (not ends or isinstance(ends[0], Cancelled) or seen == expected[prompts[0]])
        return suspensions < at

    for seed in (None, 1, 2):
        at = 1
        while not run(cut, at, seed=seed):
            at += 1
        assert at > 8, "the client was hardly ever suspended"
