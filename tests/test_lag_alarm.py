"""LagAlarm: one warning that names the place for each time the loop is stuck, none while it merely waits."""

import logging
import threading
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fakes import FakeModel, fixed
from scenes import exact, opened

from ralmspec.pipeline import Limits
from ralmspec.pipeline.lag_alarm import LagAlarm
from ralmspec.pipeline.threads import ThreadWorker


@pytest.fixture(
    params=[("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})], ids=["asyncio", "uvloop", "trio"]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    if request.param[1]:
        pytest.importorskip("uvloop")
    return request.param


class Warned(logging.Handler):
    """Collects the library's warnings, and lets whoever is stuck go on once one has come."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.one_more = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())
        self.one_more.set()


@pytest.fixture
def warned() -> Any:
    handler = Warned()
    logger = logging.getLogger("ralmspec")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def stuck(warned: Warned) -> None:
    """Blocks the loop until somebody says so."""
    warned.one_more.clear()
    assert warned.one_more.wait(10), "nobody noticed"


async def test_a_stuck_loop_is_named_once_each_time(warned: Warned) -> None:
    alarm = LagAlarm(0.05)
    alarm.start()
    try:
        for _ in range(3):
            stuck(warned)
            for _ in range(20):
                await anyio.sleep(0.005)
    finally:
        alarm.stop()
    assert len(warned.told) == 3
    for told in warned.told:
        assert "the event loop has not turned for 0.0" in told or "for 0.1" in told
        assert f"({threading.__file__}:" in told
        assert "called by stuck, called by test_a_stuck_loop_is_named_once_each_time" in told


async def test_one_that_stays_stuck_is_named_once(warned: Warned) -> None:
    alarm = LagAlarm(0.02)
    alarm.start()
    try:
        stuck(warned)
        warned.one_more.clear()
        assert not warned.one_more.wait(0.3)
        assert len(warned.told) == 1
    finally:
        alarm.stop()


class Watching(LagAlarm):
    """Notes what it sees, and how often it asks."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(limit_s)
        self.looks: list[str | None] = []
        self.asked = 0

    def start(self) -> None:
        super().start()
        post = self._post

        def ask(answer: Any) -> None:
            self.asked += 1
            post(answer)

        self._post = ask

    def _place(self) -> str | None:
        self.looks.append(super()._place())
        return self.looks[-1]


def test_a_loop_that_waits_is_not_even_asked(anyio_backend: Any, warned: Warned) -> None:
    async def wait() -> None:
        alarm.start()
        with anyio.fail_after(10):
            while len(alarm.looks) < 4:  # noqa: ASYNC110 (a thread is waited for)
                await anyio.sleep(0.5)
        alarm.stop()

    alarm = Watching(0.25)
    anyio.run(wait, backend=anyio_backend[0], backend_options=anyio_backend[1])
    assert alarm.looks.count(None) >= 3 and alarm.asked <= 1, "only a look may have come between two waits"
    assert not warned.told


async def test_a_loop_that_works_in_small_pieces_answers(warned: Warned) -> None:
    alarm = Watching(0.4)
    alarm.start()
    with anyio.fail_after(20):
        while not alarm.asked:
            for _ in range(500_000):
                pass
            await anyio.lowlevel.checkpoint()
    alarm.stop()
    assert not warned.told


class Blocks(FakeModel):
    """Its text is slow to make, once; on the loop, where the next query is written."""

    def __init__(self, warned: Warned) -> None:
        super().__init__(ends=False)
        self.warned = warned
        self.calls = 0

    def decode(self, tokens: Any) -> str:
        if threading.current_thread() is threading.main_thread():
            self.calls += 1
            if self.calls == 5:
                stuck(self.warned)
        return super().decode(tokens)


async def test_the_section_of_the_stage_is_named_and_outputs_are_exact(warned: Warned) -> None:
    """The model's tokenizer blocks in the middle of a session: the warning says in whose section that was."""
    async with opened(model=Blocks(warned), worker=ThreadWorker, limits=Limits(lag_alarm_s=0.05)) as pipeline:
        async with anyio.create_task_group() as callers:
            for prompt in ("3 1 4", "2 7 1 8", "5 3 5"):
                callers.start_soon(exact, pipeline, prompt)
        await exact(pipeline, "9 9")
    (told,) = warned.told
    assert "Blocks.decode" in told and "CycleStage._serve" in told
    assert any(f"called by {section}" in told for section in ("Lookup.take", "Generate.give", "Verify.give")), told


async def test_no_alarm_where_it_is_switched_off_or_time_is_not_real(warned: Warned) -> None:
    for settings in ({"worker": ThreadWorker, "limits": Limits(lag_alarm_s=0)}, {"worker": fixed()}):
        async with opened(**settings) as pipeline:
            await exact(pipeline)
            assert "ralmspec-lag-alarm" not in [thread.name for thread in threading.enumerate()]
    async with opened(worker=ThreadWorker) as pipeline:
        await exact(pipeline)
        assert [thread.name for thread in threading.enumerate()].count("ralmspec-lag-alarm") == 1
    assert "ralmspec-lag-alarm" not in [thread.name for thread in threading.enumerate()]


def test_it_ends_by_itself_when_the_loop_has_gone(anyio_backend: Any) -> None:
    """A program that never leaves its pipeline cannot be kept alive by it, nor be disturbed."""

    async def leave() -> LagAlarm:
        alarm = LagAlarm(0.02)
        alarm.start()
        return alarm

    alarm = anyio.run(leave, backend=anyio_backend[0], backend_options=anyio_backend[1])
    assert alarm._thread is not None and alarm._thread.daemon
    alarm._thread.join(5)
    assert not alarm._thread.is_alive()
