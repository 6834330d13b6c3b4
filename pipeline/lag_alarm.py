"""Says where the event loop is stuck when it does not turn."""

import logging
import sys
import threading
import time
from types import FrameType
from typing import Any

from anyio.lowlevel import current_token

LOG = logging.getLogger("ralmspec")
LOOPS = {"anyio", "asyncio", "selectors", "trio", "uvloop"}
DEPTH = 12
"""Calls that a warning names at most."""


class LagAlarm:
    """A thread that looks at the loop's thread now and then, and logs where it is when the loop has stopped turning.

    A thread that is in the loop's own code waits for something to do, and costs no more than the look. If it is in any
    other code, the loop is asked for a sign of life, and one warning is logged if none comes: certainly for a loop that
    is stuck for 1.8 times `limit_s`, never for one that is for less than 0.8 times. What the loop calls without any
    Python code between is not seen.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._answered = threading.Event()
        self._running = threading.Lock()  # held until `stop`; an event would cost twice as much to wait for
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Watch the loop that this is called on."""
        loop: Any = current_token().native_token
        self._post = loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon
        self._watched = threading.get_ident()
        self._running.acquire()
        self._thread = threading.Thread(target=self._watch, name="ralmspec-lag-alarm", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; harmless if it was not started."""
        if self._thread is not None:
            self._running.release()
            self._answered.set()
            self._thread.join(1)

    def _watch(self) -> None:
        while not self._running.acquire(timeout=self._limit_s):
            if self._place() is None:
                continue
            self._answered.clear()
            if not self._running.locked():  # `stop` has been here, and waits for this thread
                return
            asked = time.monotonic()
            try:
                self._post(self._answered.set)
            except RuntimeError:  # the loop has closed
                return
            if not self._answered.wait(0.8 * self._limit_s):
                where, seconds = self._place() or "the loop's own code", time.monotonic() - asked
                LOG.warning("the event loop has not turned for %.2f s; it is stuck in %s", seconds, where)
                self._answered.wait()

    def _place(self) -> str | None:
        """The innermost function with its file and line, then who called it, up to the loop; None if in the loop."""
        frame = sys._current_frames().get(self._watched)
        if frame is None or _of_a_loop(frame):
            return None
        calls = [f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"]
        caller = frame.f_back
        while caller is not None and not _of_a_loop(caller) and len(calls) < DEPTH:
            calls.append(caller.f_code.co_qualname)
            caller = caller.f_back
        return ", called by ".join(calls)


def _of_a_loop(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in LOOPS
