"""Event loops for tests: one whose clock jumps instead of waiting, and one that also shuffles what is ready.

Both stand on details of asyncio's selector loop (`_ready`, `_clock_resolution`); `test_clocks.py` checks them on the
running Python. With nothing ready and no timer left, or with no end in sight, both raise `Stuck`: a deadlock or an
endless exchange fails a test at once.
"""

import asyncio
import random
import selectors
import types
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

import anyio

Result = TypeVar("Result")


class Stuck(RuntimeError):
    """Every task waits for another, or the tasks go on for ever."""


class _Jump(selectors.SelectSelector):
    """Adds the time that would have passed to the clock."""

    def __init__(self, horizon_s: float, turns: int) -> None:
        super().__init__()
        self.now = 0.0
        self.horizon_s = horizon_s
        self.turns = turns

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Stuck("nothing is ready and no timer runs")
            self.now += max(0.0, timeout)
        self.turns -= 1
        if self.now > self.horizon_s or self.turns < 0:
            now, self.horizon_s, self.turns = self.now, 10 * self.now, 100_000  # once, so that the loop can be closed
            raise Stuck(f"no end in sight at {now:g} s")
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Virtual time: sleeps take none, and end exactly when they should. No test needs a day of it."""

    horizon_s = 86_400.0
    turns = 2_000_000

    def __init__(self) -> None:
        self.clock = _Jump(self.horizon_s, self.turns)
        super().__init__(self.clock)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.clock.now


class _Shuffled(deque[Any]):
    """Ready callbacks come out in an order that a seed draws; now and then time passes between two of them."""

    def __init__(self, loop: "ShuffledLoop", items: Any) -> None:
        super().__init__(items)
        self.loop = loop

    def popleft(self) -> Any:
        generator = self.loop.generator
        if len(self) > 1:
            self.rotate(-generator.randrange(len(self)))
        if generator.random() < self.loop.jitter:
            self.loop.clock.now += generator.expovariate(200)
        return super().popleft()


class ShuffledLoop(VirtualLoop):
    """Virtual time and a seeded order of everything that is ready."""

    def __init__(self, seed: int, jitter: float = 0.05) -> None:
        self.generator = random.Random(seed)
        self.jitter = jitter
        super().__init__()
        self._ready: deque[Any] = _Shuffled(self, getattr(self, "_ready"))  # noqa: B009


def run(main: Callable[..., Awaitable[Result]], *arguments: Any, seed: int | None = None) -> Result:
    """Run `main(*arguments)` on a virtual loop of its own; with a seed, on a shuffled one."""
    factory = VirtualLoop if seed is None else lambda: ShuffledLoop(seed)
    return anyio.run(main, *arguments, backend_options={"loop_factory": factory})


@types.coroutine
def interrupted(coroutine: Coroutine[Any, Any, None], at: int, act: Callable[[], object]) -> Generator[Any, Any, int]:
    """Runs a coroutine and acts on it when it is suspended for the `at`-th time; how often it was suspended."""
    suspensions = 0
    resume: Callable[[Any], Any] = coroutine.send
    answer: Any = None
    while True:
        try:
            pause = resume(answer)
        except StopIteration:
            return suspensions
        suspensions += 1
        if suspensions == at:
            act()
        try:
            answer, resume = (yield pause), coroutine.send
        except BaseException as error:
            answer, resume = error, coroutine.throw
