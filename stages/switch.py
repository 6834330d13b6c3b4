"""Sends every session on to the stages where it is due, and its events on to the caller.

All stages of the cycle give their sessions back to the one `Switch`; nothing else puts anything into a queue. A session
has at most one turn in Lookup or Generate, one in Verify and one in Prefetch, so queues as long as there are live
sessions cannot be full, and no send inside the cycle ever waits (rules R5 to R7).
"""

from collections import deque
from collections.abc import Callable
from typing import NoReturn

import anyio

from .messages import Done, Event, Turn
from .session import Move, Session
from .stage import Outbox


class Sink:
    """Events that wait for one reader; who reads, wakes the session's work again (R8)."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self.arrived = anyio.Event()

    def put(self, event: Event) -> None:
        """Leave an event for the reader."""
        self.events.append(event)
        self.arrived.set()


class Switch:
    """The outbox of the stages of the cycle, and the table of live sessions."""

    def __init__(
        self,
        *,
        lookup: Outbox[Turn],
        generate: Outbox[Turn],
        verify: Outbox[Turn],
        prefetch: Outbox[Turn],
        output: Outbox[Event] | None,
        now: Callable[[], float],
        released: Callable[[Session], None],
    ) -> None:
        self.live: dict[int, Session] = {}
        self.sinks: dict[int, Sink] = {}
        self._lookup = lookup
        self._generate = generate
        self._verify = verify
        self._prefetch = prefetch
        self._output = output
        self._now = now
        self._released = released

    async def send(self, session: Session, /) -> None:
        """`send_nowait`; it never has to wait."""
        self.send_nowait(session)

    def send_nowait(self, session: Session, /) -> None:
        """Wake: give the session every turn that is due now, or its slot back if it has ended and all is home."""
        if session.final:
            if session.home and session.id in self.live:
                del self.live[session.id]
                del self.sinks[session.id]
                self._released(session)
            return
        if not session.checking_out and session.checks_due:
            session.checking_out = True
            self._give(self._verify, session)
        if not session.fetching_out and session.wanted:
            session.fetching_out = True
            self._give(self._prefetch, session)
        if not session.turn_out and (move := session.move) is not None:
            session.turn_out = True
            self._give(self._lookup if move is Move.LOOK else self._generate, session)

    def emit(self, event: Event) -> None:
        """First step of an event's way to the caller; called by the session's sections."""
        if self._output is None:
            self.deliver(event)
        else:
            try:
                self._output.send_nowait(event)
            except anyio.WouldBlock:
                overflow("output", event)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                self.deliver(event)  # the output path is dead; the caller still learns how it ended

    def deliver(self, event: Event) -> None:
        """Last step of an event's way to the caller."""
        sink = self.sinks.get(event.session)
        if sink is not None:
            sink.put(event)
        if isinstance(event, Done) and (session := self.live.get(event.session)) is not None:
            session.closing_out = False

    def _give(self, outbox: Outbox[Turn], session: Session) -> None:
        turn = Turn(session=session.id, epoch=session.epoch, issued=self._now())
        try:
            outbox.send_nowait(turn)
        except anyio.WouldBlock:
            overflow("stage", turn)


def overflow(queue: str, item: object) -> NoReturn:
    """A full queue means that the counting of what is out is wrong: say so, loudly, instead of waiting for ever."""
    raise RuntimeError(f"the {queue} queue is full, which rules R5-R7 exclude: {item!r}")
