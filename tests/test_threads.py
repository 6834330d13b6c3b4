"""Real threads behind the worker seam: which thread, how many, what cancelling does, and what a hung call does."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ralmspec.pipeline import RalmspecError
from ralmspec.pipeline.threads import ThreadWorker

BACKENDS = [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})]


@pytest.fixture(params=BACKENDS, ids=["asyncio", "uvloop", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    if request.param[1]:
        pytest.importorskip("uvloop")
    return request.param


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opens at the latest when the test is over, so that no thread outlives it."""
    gate = threading.Event()
    yield gate
    gate.set()


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 (a thread is waited for)
            await anyio.sleep(0.001)


def double(number: int) -> tuple[int, str]:
    return 2 * number, threading.current_thread().name


async def test_results_and_errors_come_back_from_one_thread_of_its_own() -> None:
    worker = ThreadWorker("device")
    assert [await worker.call(double, n) for n in range(3)] == [(2 * n, "ralmspec-device-0") for n in range(3)]
    with pytest.raises(ZeroDivisionError):
        await worker.call(lambda: 1 // 0)
    assert (await worker.call(double, 4))[0] == 8
    assert worker.close(5)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ralmspec-device")]


async def test_the_loop_is_free_while_a_call_runs(gate: threading.Event) -> None:
    worker = ThreadWorker("device")

    async def open_it() -> None:
        gate.set()

    async with anyio.create_task_group() as group:
        group.start_soon(open_it)
        assert await worker.call(gate.wait, 10)
    assert worker.close(5)


async def test_no_more_calls_at_once_than_threads(gate: threading.Event) -> None:
    worker = ThreadWorker("device", threads=2)
    together = most = 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        gate.wait(10)
        with lock:
            together -= 1

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(worker.call, work)
        await until(lambda: most == 2)
        assert worker.running == 6
        gate.set()
    assert most == 2 and worker.running == 0
    assert worker.close(5)


async def test_cancelling_waits_for_the_call_and_never_adds_a_thread(gate: threading.Event) -> None:
    worker = ThreadWorker("device")
    ended: list[int] = []
    before = threading.active_count()

    def work(number: int) -> None:
        gate.wait(10)
        ended.append(number)

    async def cancelled(number: int) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await worker.call(work, number)
            ended.append(-number)  # a call that came home is not lost; the next checkpoint is where the cut shows
            await checkpoint()
        assert scope.cancelled_caught

    async with anyio.create_task_group() as group:
        for number in range(1, 21):
            group.start_soon(cancelled, number)
        await until(lambda: worker.running == 20)
        assert threading.active_count() == before + 1 and not ended
        gate.set()
    assert sorted(ended) == sorted([*range(1, 21), *range(-20, 0)])
    assert worker.close(5)


async def test_abandon_gives_up_what_is_running_at_once(gate: threading.Event) -> None:
    worker = ThreadWorker("device")

    async def hang() -> None:
        with pytest.raises(RalmspecError, match="device"):
            await worker.call(gate.wait, 10)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(hang)
            group.start_soon(hang)
            await until(lambda: worker.running == 2)
            began = worker.oldest_call()
            assert 0 <= anyio.current_time() - began < 5
            worker.abandon()
        assert worker.running == 0 and worker.oldest_call() == float("inf")
        assert not worker.close(0.0), "the thread itself goes on"
    gate.set()
    assert worker.close(5)


def test_a_thread_that_ends_after_its_loop_harms_nobody(gate: threading.Event, anyio_backend: Any) -> None:
    worker = ThreadWorker("device")

    async def leave() -> None:
        async def hang() -> None:
            with pytest.raises(RalmspecError):
                await worker.call(gate.wait, 10)

        async with anyio.create_task_group() as group:
            group.start_soon(hang)
            await until(lambda: worker.running == 1)
            worker.abandon()

    anyio.run(leave, backend=anyio_backend[0], backend_options=anyio_backend[1])
    gate.set()
    assert worker.close(5)


async def test_its_threads_cannot_keep_the_process_alive() -> None:
    worker = ThreadWorker("device", threads=2)
    await worker.call(int)
    assert [thread.daemon for thread in threading.enumerate() if thread.name.startswith("ralmspec-device")] == [
        True
    ] * 2
    assert worker.close(5)
