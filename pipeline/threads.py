"""Real threads behind the worker seam: one per device, owned by the pipeline."""

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar, TypeVarTuple

import anyio
from anyio.lowlevel import current_token

from ralmspec.stages.errors import WorkerLost

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class ThreadWorker:
    """Runs blocking calls in threads of its own, `threads` at a time and no more; extra calls wait in a queue.

    Native libraries keep thread pools and contexts per calling thread, so each device gets threads that stay the same.
    The threads are daemons: a native call that hangs for ever cannot keep the process alive. No thread can be stopped,
    so cancelling waits for the call; one that is given up by `abandon` raises `WorkerLost` where it was called.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        self.name = name
        self._calls: dict[anyio.Event, float] = {}  # in order of their beginning
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._number = threads
        self._threads: list[threading.Thread] = []

    async def call(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Run `work(*arguments)` in a thread, and wait for it whatever happens."""
        if not self._threads:
            self._start()
        done = anyio.Event()
        outcome: list[Any] = []
        loop: Any = current_token().native_token
        post = loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon

        def run() -> None:
            try:
                outcome.append((work(*arguments), None))
            except BaseException as error:  # it belongs to whoever called
                outcome.append((None, error))
            with suppress(RuntimeError):  # the loop has closed: nobody waits any more
                post(done.set)

        self._calls[done] = anyio.current_time()
        self._inbox.put(run)
        try:
            with anyio.CancelScope(shield=True):
                await done.wait()
        finally:
            del self._calls[done]
        if not outcome:
            raise WorkerLost(f"a call in the {self.name} thread did not end in time")
        result, error = outcome.pop()
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    @property
    def running(self) -> int:
        """Calls that somebody waits for."""
        return len(self._calls)

    def oldest_call(self) -> float:
        """When the longest of the running calls began; infinity if none runs."""
        return next(iter(self._calls.values()), float("inf"))

    def abandon(self) -> None:
        """Stop waiting for the calls that are running."""
        for done in self._calls:
            done.set()

    def close(self, timeout_s: float) -> bool:
        """Let the threads end after their present call; whether they did within the time. Blocks."""
        for _ in self._threads:
            self._inbox.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    def _start(self) -> None:
        names = [f"ralmspec-{self.name}-{n}" for n in range(self._number)]
        self._threads = [threading.Thread(target=self._serve, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def _serve(self) -> None:
        while (run := self._inbox.get()) is not None:
            run()
