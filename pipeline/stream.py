"""A session as its caller sees it: a context-managed stream of events."""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import anyio
from anyio.lowlevel import checkpoint

from ralmspec.stages.messages import Committed, Done, Event
from ralmspec.stages.request import Request, Status
from ralmspec.stages.sink import Sink
from ralmspec.stages.statistics import Statistics
from ralmspec.stages.trace import Span

from .errors import Cancelled
from .runner import Runner


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: its text, its tokens, the committed steps with their documents, and what it took."""

    text: str
    tokens: tuple[int, ...]
    steps: tuple[Committed, ...]
    statistics: Statistics
    timeline: tuple[Span, ...] = ()


class SessionStream:
    """One request being served.

        async with pipeline.session("who plays ken barlow?") as session:
            async for event in session: ...

    Entering takes a slot, and waits for one if need be (`Overloaded` where that would be in vain). Leaving the block,
    however it is left, ends the session and frees what it held. Events come in order; `Done` is the last, and a session
    that ends otherwise raises its error instead: a stream that stops without `Done` or an error does not exist. One
    task at a time may read.
    """

    def __init__(self, runner: Runner, request: Callable[[], Request]) -> None:
        self._runner = runner
        self._request = request
        self._entering: anyio.CancelScope | None = None
        self._entered: Sink | None = None
        self._ended = False

    async def __aenter__(self) -> Self:
        if self._entering is not None:
            raise RuntimeError("a session can be entered once; ask the pipeline for another one")
        request = self._request()
        with anyio.CancelScope() as self._entering:
            await checkpoint()
            self._entered = await self._runner.admit(request)
        if self._entering.cancel_called:  # by `cancel`; a cut from elsewhere raises in the scope, and leaves nothing
            self.cancel()
            raise Cancelled("the session was cancelled before it began")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.end(self._sink.session, Status.CANCELLED, Cancelled("the session's block was left"))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        sink = self._sink
        if self._ended:
            raise StopAsyncIteration
        await checkpoint()
        event = await sink.get()
        if isinstance(event, Done):
            self._ended = True
            if event.error is not None:
                raise event.error
        return event

    @property
    def _sink(self) -> Sink:
        if self._entered is None:
            raise RuntimeError("enter the session with `async with` first")
        return self._entered

    def cancel(self) -> None:
        """End the session from another task; its reader sees `Cancelled`, and so does who waits for it to begin.

        Harmless before it is entered, or again.
        """
        if self._entered is not None:
            self._runner.end(self._entered.session, Status.CANCELLED, Cancelled("the session was cancelled"))
        elif self._entering is not None:
            self._entering.cancel()

    @property
    def id(self) -> int:
        """The session's number, never used twice in a process."""
        return self._sink.session.id

    @property
    def statistics(self) -> Statistics:
        """What it has taken so far."""
        return self._sink.session.statistics

    @property
    def timeline(self) -> tuple[Span, ...]:
        """Who worked on which step when; empty unless the session was opened with `trace=True`."""
        trace = self._sink.session.trace
        return tuple(trace.spans) if trace else ()
