"""The waiting room in front of the slots and the KV memory: order, bounds, deadlines, hints (R1, R6).

Every other way out of it is in `test_leaving_the_room.py`.

Plain functions on loops of their own, as in `test_rules.py`: `mutants.py` breaks what they hold.
"""

import anyio
import pytest
from clocks import run
from fakes import FakeModel
from scenes import PROMPT, exact, expected, opened, until

from ralmspec.pipeline import (
    Committed,
    DeadlineExceeded,
    Limits,
    Overloaded,
    Pipeline,
)
from ralmspec.pipeline.admission import FIRST_HINT_S

ROOM = 256 + 512
"""Tokens that a session of these pipelines may need before its first new one."""


class Small(FakeModel):
    """Has KV memory for so many tokens, and notes what it tokenises."""

    def __init__(self, kv_tokens: int = 1 << 30) -> None:
        super().__init__(ends=False)
        self.kv_tokens = kv_tokens
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return super().encode(text)


async def served(pipeline: Pipeline, begun: list[str], prompt: str, max_new_tokens: int = 4) -> None:
    """One session to its end; notes when it begins."""
    tokens: list[int] = []
    async with pipeline.session(prompt, max_new_tokens=max_new_tokens) as session:
        begun.append(prompt)
        async for event in session:
            tokens += event.tokens if isinstance(event, Committed) else ()
    assert tokens == expected(pipeline, prompt, max_new_tokens)


def test_who_finds_no_slot_waits_and_is_let_in_in_the_order_of_coming() -> None:
    async def scenario() -> None:
        begun: list[str] = []
        prompts = [f"{n} {n} 4" for n in range(9)]
        async with opened(limits=Limits(sessions=1, waiting=8)) as pipeline:
            async with anyio.create_task_group() as callers:
                for prompt in prompts:
                    callers.start_soon(served, pipeline, begun, prompt)
                    await anyio.sleep(0.01)
                assert (pipeline.live_sessions, pipeline.waiting_sessions) == (1, 8)
            assert begun == prompts and not pipeline.waiting_sessions

    run(scenario)
    for seed in range(10):
        run(scenario, seed=seed)


def test_kv_memory_bounds_who_is_live() -> None:
    """There is room for two sessions of three; what they held is free again when they are over."""

    async def scenario() -> None:
        begun: list[str] = []
        most = 0
        async with opened(model=Small(2 * (ROOM + 4) + 3)) as pipeline, anyio.create_task_group() as callers:
            for n in range(7):
                callers.start_soon(served, pipeline, begun, f"{n} 1 4")
            while len(begun) < 7:
                most = max(most, pipeline.live_sessions)
                await anyio.sleep(0.01)
        assert most == 2

    run(scenario)
    for seed in range(5):
        run(scenario, seed=seed)


def test_a_large_request_is_not_overtaken() -> None:
    async def scenario() -> None:
        begun: list[str] = []
        async with opened(model=Small(2400)) as pipeline, anyio.create_task_group() as callers:
            callers.start_soon(served, pipeline, begun, "1 1", 40)
            await anyio.sleep(0.01)
            callers.start_soon(served, pipeline, begun, "2 2", 1600)  # needs all of it but 32 tokens
            await anyio.sleep(0.01)
            callers.start_soon(served, pipeline, begun, "3 3", 4)  # would fit beside the first one
            await anyio.sleep(0.01)
            assert (pipeline.live_sessions, pipeline.waiting_sessions) == (1, 2)
        assert begun == ["1 1", "2 2", "3 3"]

    run(scenario)


@pytest.mark.parametrize("waiting", [0, 2])
def test_a_full_room_refuses_at_once(waiting: int) -> None:
    run(overfull, waiting)


async def overfull(waiting: int) -> None:
    """Before the prompt is tokenised, in no time, with a hint and the reason; then all goes on."""
    model, begun = Small(), list[str]()
    async with opened(model=model, limits=Limits(sessions=2, waiting=waiting)) as pipeline:
        async with anyio.create_task_group() as callers:
            for n in range(2 + waiting):
                callers.start_soon(served, pipeline, begun, f"{n} 3")
            await anyio.sleep(0.01)
            began = anyio.current_time()
            with pytest.raises(Overloaded, match=rf"2 slots .* \({waiting} of {waiting} places\).*Limits") as refusal:
                await pipeline.complete("5 5")
            assert anyio.current_time() == began and "5 5" not in model.texts
            assert refusal.value.retry_after_s == FIRST_HINT_S
            assert pipeline.waiting_sessions == waiting
        await until(lambda: not pipeline.live_sessions)
        await exact(pipeline)


def test_the_refusal_names_the_bound() -> None:
    async def scenario() -> None:
        async with opened(model=Small(1000), limits=Limits(waiting=0)) as pipeline, pipeline.session(PROMPT):
            with pytest.raises(Overloaded, match=r"no KV memory .* 778 tokens .*\(104 of 1000 .*lower max_new_tokens"):
                await pipeline.complete(PROMPT, max_new_tokens=10)

    run(scenario)


def test_a_session_that_could_never_fit_is_a_mistake() -> None:
    async def scenario() -> None:
        async with opened(model=Small(ROOM + 10)) as pipeline:
            await exact(pipeline, max_new_tokens=10)
            with pytest.raises(ValueError, match=f"{ROOM + 11} tokens, the model has room for {ROOM + 10}"):
                pipeline.session(PROMPT, max_new_tokens=11)

    run(scenario)


def test_the_deadline_counts_from_entering_and_passes_in_the_room() -> None:
    """Nobody is begun whose deadline has passed, and the next one in the room is let in as if it had not been there."""

    async def scenario() -> None:
        model, begun = Small(), list[str]()
        pipeline = opened(model=model, limits=Limits(sessions=1))
        async with pipeline, anyio.create_task_group() as callers, pipeline.session(PROMPT, max_new_tokens=400):
            for deadline_s in (1.0, 2.0, 3.0):
                callers.start_soon(late, pipeline, deadline_s)
            await anyio.sleep(0.5)
            callers.start_soon(served, pipeline, begun, "2 7")
            await anyio.sleep(4)
            assert (pipeline.live_sessions, pipeline.waiting_sessions) == (1, 1)
        assert len(model.forgotten) == 2, "there were other sessions"

    run(scenario)


async def late(pipeline: Pipeline, deadline_s: float) -> None:
    began = anyio.current_time()
    with pytest.raises(DeadlineExceeded, match="could begin"):
        await pipeline.complete(PROMPT, deadline_s=deadline_s)
    assert anyio.current_time() == pytest.approx(began + deadline_s, abs=1e-6)


def test_a_hopeless_wait_is_refused_at_once() -> None:
    """Sessions take ten seconds, one at a time: who cannot wait that long is told so instead of waiting in vain."""

    async def scenario() -> None:
        async def ten_seconds(pipeline: Pipeline) -> None:
            async with pipeline.session(PROMPT, max_new_tokens=400):
                await anyio.sleep(10)

        async def hopeless(pipeline: Pipeline, deadline_s: float, wait_s: float) -> None:
            began = anyio.current_time()
            with pytest.raises(Overloaded, match="after its deadline.*or raise Limits") as refusal:
                await pipeline.complete(PROMPT, deadline_s=deadline_s)
            assert anyio.current_time() == began
            assert refusal.value.retry_after_s == pytest.approx(wait_s, rel=0.05)

        async with opened(limits=Limits(sessions=1, waiting=2)) as pipeline, anyio.create_task_group() as callers:
            await ten_seconds(pipeline)
            await until(lambda: not pipeline.live_sessions)
            callers.start_soon(ten_seconds, pipeline)
            await anyio.sleep(0.01)
            await hopeless(pipeline, 9, 10)
            callers.start_soon(ten_seconds, pipeline)
            await anyio.sleep(0.01)
            await hopeless(pipeline, 19, 20)
            began = anyio.current_time()
            async with pipeline.session(PROMPT, deadline_s=22):  # and this one has time enough
                assert anyio.current_time() == pytest.approx(began + 20, abs=1)

    run(scenario)


def test_nobody_is_let_wait_for_longer_than_the_pipelines_patience() -> None:
    """Sessions take ten seconds, one at a time, and fifteen may be waited: so one may wait, however many places there
    are; and whoever comes when there is a slot is let in, whatever they took lately."""

    async def scenario() -> None:
        async def ten_seconds(pipeline: Pipeline) -> None:
            async with pipeline.session(PROMPT, max_new_tokens=400):
                begun.append(anyio.current_time())
                await anyio.sleep(10)

        begun: list[float] = []
        limits = Limits(sessions=1, waiting=8, patience_s=15)
        async with opened(limits=limits) as pipeline, anyio.create_task_group() as callers:
            await ten_seconds(pipeline)
            await until(lambda: not pipeline.live_sessions)
            callers.start_soon(ten_seconds, pipeline)
            await anyio.sleep(0.01)
            callers.start_soon(ten_seconds, pipeline)
            await anyio.sleep(0.01)
            came = anyio.current_time()
            with pytest.raises(Overloaded, match=r"in about 20 s, over Limits\(patience_s=15\)") as refusal:
                await pipeline.complete(PROMPT)
            assert anyio.current_time() == came and pipeline.waiting_sessions == 1
            assert refusal.value.retry_after_s == pytest.approx(20, rel=0.05)
            await anyio.sleep(11)
            async with pipeline.session(PROMPT):  # now there is only one in front of it
                assert anyio.current_time() < came + 21
        assert len(begun) == 3

    run(scenario)
    for seed in range(5):
        run(scenario, seed=seed)


def test_the_hint_is_when_all_who_wait_will_have_been_let_in() -> None:
    """Sixteen are served, four at a time; who comes back after the hint finds a place in the room, or a slot."""

    async def scenario() -> None:
        async def session(pipeline: Pipeline) -> None:
            async with pipeline.session(PROMPT, max_new_tokens=400):
                await anyio.sleep(8)

        async with opened(limits=Limits(sessions=4, waiting=8)) as pipeline, anyio.create_task_group() as callers:
            for _ in range(12):
                callers.start_soon(session, pipeline)
            await anyio.sleep(8.5)  # the first four are over, the next are in
            for _ in range(4):
                callers.start_soon(session, pipeline)
            await anyio.sleep(0.1)
            with pytest.raises(Overloaded) as refusal:
                await pipeline.complete(PROMPT)
            assert refusal.value.retry_after_s == pytest.approx(8 * 9 / 4, rel=0.1)
            await anyio.sleep(refusal.value.retry_after_s)
            assert pipeline.waiting_sessions == 0

    run(scenario)


def test_limits_refuse_what_makes_no_sense() -> None:
    assert Limits(waiting=0, lag_alarm_s=0)
    for wrong in (
        {"waiting": -1},
        {"lag_alarm_s": -0.1},
        {"sessions": 0},
        {"drain_s": float("nan")},
        {"patience_s": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)
