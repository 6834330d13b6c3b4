"""Event loops for tests: one whose clock jumps instead of waiting, and one that also shuffles what is ready.

Both stand on details of asyncio's selector loop (`_ready`, `_clock_resolution`); `test_clocks.py` checks them on the
running Python. With nothing ready and no timer left, both raise `Stuck`: a deadlock fails a test at once.
"""

import asyncio
import random
import selectors
from collections import deque
from typing import Any


class Stuck(RuntimeError):
    """Every task waits for another."""


class _Jump(selectors.SelectSelector):
    """Adds the time that would have passed to the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Stuck("nothing is ready and no timer runs")
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Virtual time: sleeps take none, and end exactly when they should."""

    def __init__(self) -> None:
        self.clock = _Jump()
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
        self._ready = _Shuffled(self, self._ready)
