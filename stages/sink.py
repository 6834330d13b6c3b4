"""Where a session's events wait for its caller."""

from collections import deque
from collections.abc import Callable

import anyio

from .messages import Event
from .session import Session


class Sink:
    """Events that wait for one reader (R8). Bounded by the session, which begins no work while it is full."""

    def __init__(self, session: Session, wake: Callable[[Session], None]) -> None:
        self.events: deque[Event] = deque()
        self.session = session
        self._wake = wake
        self._arrived = anyio.Event()
        self._waited_for = False

    def put(self, event: Event) -> None:
        """Leave an event for the reader."""
        self.events.append(event)
        self.session.reader.told()
        self._arrived.set()

    async def get(self) -> Event:
        """The next event; taking it lets the session work again. `anyio.BusyResourceError` while another task waits."""
        if self._waited_for:
            raise anyio.BusyResourceError("reading from")
        self._waited_for = True
        try:
            while not self.events:
                self._arrived = anyio.Event()
                await self._arrived.wait()
        finally:
            self._waited_for = False
        event = self.events.popleft()
        self.session.reader.heard()
        self._wake(self.session)
        return event
