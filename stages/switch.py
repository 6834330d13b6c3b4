"""Sends every session on to the stages where it is due, and its events on to the caller.

All stages of the cycle give their sessions back to the one `Switch`; nothing else puts anything into a queue. A session
has at most one turn in Lookup or Generate, one in Prefetch and `flights` in Verify, so queues as long as there may be
such turns cannot be full, and no send inside the cycle ever waits (R5 to R7).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NoReturn

import anyio

from .errors import InvariantBroken
from .messages import Check, Done, Event, Place, Turn
from .request import Status
from .session import Session
from .sink import Sink
from .stage import Outbox
from .step import Move


class Switch:
    """The outbox of the stages of the cycle, and the table of live sessions."""

    def __init__(
        self,
        turns: Mapping[Place, Outbox[Turn]],
        *,
        output: Outbox[Event] | None,
        now: Callable[[], float],
        released: Callable[[Session], None],
    ) -> None:
        self.live: dict[int, Session] = {}
        self.progress = now()
        """When a session last came back from a stage, whichever it was."""
        self._sinks: dict[int, Sink] = {}
        self._turns = turns
        self._output = output
        self._now = now
        self._released = released

    def register(self, session: Session) -> Sink:
        """A session becomes live and gets its first turn, in one section (R1)."""
        sink = Sink(session, self.send_nowait)
        self.live[session.id] = session
        self._sinks[session.id] = sink
        self.send_nowait(session)
        return sink

    async def send(self, session: Session, /) -> None:
        """`send_nowait`; it never has to wait."""
        self.send_nowait(session)

    def send_nowait(self, session: Session, /) -> None:
        """Wake: give the session every turn that is due now, or its slot back if it has ended and all is home."""
        self.progress = self._now()
        if session.final:
            if session.home and session.id in self.live:
                del self.live[session.id]
                del self._sinks[session.id]
                self._released(session)
            return
        try:
            while session.checks_due:
                self._give(Place.VERIFY, session, session.launch())
            if Place.PREFETCH not in session.out and session.wanted:
                self._give(Place.PREFETCH, session)
            if session.out.isdisjoint((Place.LOOKUP, Place.GENERATE)) and (move := session.move) is not None:
                self._give(Place.LOOKUP if move is Move.LOOK else Place.GENERATE, session)
        except anyio.WouldBlock:
            overflow(session)

    def emit(self, event: Event) -> None:
        """First step of an event's way to the caller; called by the session's sections."""
        if self._output is None:
            self.deliver(event)
            return
        try:
            self._output.send_nowait(event)
        except anyio.WouldBlock:
            overflow(event)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # the output path is dead with what was in it, so is the engine, and `bury` will say so
        else:
            self.live[event.session].reader.told()

    def picked_up(self, event: Event) -> None:
        """An output stage has taken the event; what it makes of it, and whether it lives on, is its own business."""
        if (session := self.live.get(event.session)) is not None:
            session.reader.heard()
            self.send_nowait(session)

    def deliver(self, event: Event) -> None:
        """Last step of an event's way to the caller."""
        if (sink := self._sinks.get(event.session)) is not None:
            sink.put(event)
            if isinstance(event, Done):
                sink.session.out.discard(Place.OUTPUT)

    def bury(self, session: Session, error: BaseException) -> None:
        """No stage runs any more, so nothing is out: end the session if need be, and release it."""
        session.finish(Status.FAILED, error)
        if Place.OUTPUT in session.out:  # its end was lost on the output path, and maybe more: it is not complete
            self.deliver(replace(session.last_event(), error=error))
        session.write_off()
        self.send_nowait(session)

    def _give(self, place: Place, session: Session, checks: tuple[Check, ...] = ()) -> None:
        if place is not Place.VERIFY:  # those turns are counted where their checks fly
            session.out.add(place)
        turn = Turn(session=session.id, epoch=session.epoch, place=place, issued=self._now(), checks=checks)
        self._turns[place].send_nowait(turn)


def overflow(item: object) -> NoReturn:
    """A full queue means that the counting of what is out is wrong: say so, loudly, instead of waiting for ever."""
    raise InvariantBroken(f"a queue is full, which rules R5 to R7 exclude: {item!r}")
