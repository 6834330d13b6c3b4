"""The loops that the other tests stand on: exact virtual time, seeded order, and no waiting for ever."""

import asyncio
import time
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from clocks import ShuffledLoop, Stuck, VirtualLoop, run


async def order_of(tasks: int) -> list[tuple[int, int]]:
    order: list[tuple[int, int]] = []

    async def speak(name: int) -> None:
        for turn in range(3):
            order.append((name, turn))
            await checkpoint()

    async with anyio.create_task_group() as group:
        for name in range(tasks):
            group.start_soon(speak, name)
    return order


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


async def test_sleeps_end_exactly_when_they_should_and_take_no_time() -> None:
    began = time.perf_counter()
    ends: list[float] = []

    async def sleep(seconds: float) -> None:
        await anyio.sleep(seconds)
        ends.append(anyio.current_time())

    async with anyio.create_task_group() as group:
        for seconds in (3600.0, 0.25, 0.5, 0.5, 7.0):
            group.start_soon(sleep, seconds)
    assert ends == [0.25, 0.5, 0.5, 7.0, 3600.0]
    assert time.perf_counter() - began < 10


async def test_deadlines_come_exactly_when_they_should() -> None:
    with anyio.move_on_after(2.5):
        await anyio.sleep_forever()
    assert anyio.current_time() == 2.5
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.5):
            await anyio.sleep(60)
    assert anyio.current_time() == 4.0


async def test_without_a_seed_tasks_run_in_the_order_they_became_ready() -> None:
    assert await order_of(3) == [(name, turn) for turn in range(3) for name in range(3)]


def test_same_seed_same_order_and_time() -> None:
    async def scenario() -> tuple[Any, float]:
        return await order_of(6), anyio.current_time()

    assert [run(scenario, seed=seed) for seed in range(10)] == [run(scenario, seed=seed) for seed in range(10)]


def test_different_seeds_different_orders() -> None:
    orders = {tuple(run(order_of, 6, seed=seed)) for seed in range(20)}
    assert len(orders) == 20
    for order in orders:  # every task still takes its own turns one after the other
        assert all([turn for name, turn in order if name == task] == [0, 1, 2] for task in range(6))


def test_now_and_then_time_passes_between_two_callbacks() -> None:
    async def scenario() -> float:
        for _ in range(1000):
            await checkpoint()
        return anyio.current_time()

    spent = [run(scenario, seed=seed) for seed in range(5)]
    assert len(set(spent)) == 5 and all(0 < seconds < 5 for seconds in spent)
    assert run(scenario) == 0


@pytest.mark.parametrize("seed", [None, 0])
def test_a_deadlock_is_seen_at_once(seed: int | None) -> None:
    async def scenario() -> None:
        first, second = anyio.Event(), anyio.Event()

        async def wait(mine: anyio.Event, other: anyio.Event) -> None:
            await other.wait()
            mine.set()

        async with anyio.create_task_group() as group:
            group.start_soon(wait, first, second)
            group.start_soon(wait, second, first)

    with pytest.raises(Stuck, match="nothing is ready"):
        run(scenario, seed=seed)


@pytest.mark.parametrize("pause_s", [0.0, 60.0], ids=["no time passes", "only time passes"])
def test_an_endless_exchange_is_seen(monkeypatch: pytest.MonkeyPatch, pause_s: float) -> None:
    monkeypatch.setattr(VirtualLoop, "turns", 5_000)

    async def scenario() -> None:
        while True:  # noqa: ASYNC110 (the point of it)
            await anyio.sleep(pause_s)

    with pytest.raises(Stuck, match="no end in sight"):
        run(scenario)


def test_a_shuffled_loop_closes_cleanly() -> None:
    loop = ShuffledLoop(3)
    loop.run_until_complete(asyncio.sleep(1))
    assert loop.time() >= 1
    loop.close()
    assert loop.is_closed()
