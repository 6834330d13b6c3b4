"""A session as its caller sees it: a context-managed stream of events."""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import anyio
from anyio.lowlevel import checkpoint

from ralmspec.stages.messages import Committed, Done, Event
from ralmspec.stages.session import Request, Session, Status
from ralmspec.stages.statistics import Statistics
from ralmspec.stages.switch import Sink
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

    Entering takes a slot (`Overloaded` when there is none). Leaving the block, however it is left, ends the session
    and frees what it held. Events come in order; `Done` is the last, and a session that ends otherwise raises its
    error instead: a stream that stops without `Done` or an error does not exist. One task at a time may read.
    """

    def __init__(self, runner: Runner, request: Callable[[], Request]) -> None:
        self._runner = runner
        self._request = request
        self._session: Session | None = None
        self._sink: Sink | None = None
        self._ended = False

    async def __aenter__(self) -> Self:
        self._runner.refuse_if_closed()  # the cheap refusal, before the prompt is tokenised
        request = self._request()
        await checkpoint()
        self._session, self._sink = self._runner.admit(request)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            self._runner.end(self._session, Status.CANCELLED, Cancelled("the session's block was left"))
        self._ended = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._session is None or self._sink is None:
            raise RuntimeError("enter the session with `async with` before reading it")
        if self._ended:
            raise StopAsyncIteration
        await checkpoint()
        while not self._sink.events:
            self._sink.arrived = anyio.Event()
            await self._sink.arrived.wait()
        event = self._sink.events.popleft()
        self._session.read = event.serial + 1
        self._runner.switch.send_nowait(self._session)
        if isinstance(event, Done):
            self._ended = True
            if event.error is not None:
                raise event.error
        return event

    def cancel(self) -> None:
        """End the session from another task; its reader sees `Cancelled`."""
        if self._session is not None:
            self._runner.end(self._session, Status.CANCELLED, Cancelled("the session was cancelled"))

    @property
    def id(self) -> int:
        """The session's number in this pipeline, never used twice."""
        if self._session is None:
            raise RuntimeError("a session has no id before it is entered")
        return self._session.id

    @property
    def statistics(self) -> Statistics:
        """What it has taken so far."""
        if self._session is None:
            raise RuntimeError("a session has no statistics before it is entered")
        return self._session.statistics

    @property
    def timeline(self) -> tuple[Span, ...]:
        """Who worked on which step when; empty unless the session was opened with `trace=True`."""
        return tuple(self._session.trace.spans) if self._session and self._session.trace else ()
