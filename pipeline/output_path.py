"""The two ends of the path that events take through a user's output stages."""

from typing import Self

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream

from ralmspec.stages.messages import Event
from ralmspec.stages.session import Session
from ralmspec.stages.stage import Inbox, Outbox, take
from ralmspec.stages.switch import Switch


class PickUp:
    """The first inbox of the output path: tells the switch of every event that leaves its queue (R8)."""

    def __init__(self, inbox: MemoryObjectReceiveStream[Event], switch: Switch) -> None:
        self._inbox = inbox
        self._switch = switch

    async def receive(self) -> Event:
        """The next event."""
        event = await self._inbox.receive()
        self._switch.picked_up(event)
        return event

    def receive_nowait(self) -> Event:
        """The next event, or `anyio.WouldBlock`."""
        event = self._inbox.receive_nowait()
        self._switch.picked_up(event)
        return event

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._inbox.close()


class Delivery:
    """Last stage of the output path: hands events to their readers, and wakes the session that ended."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch

    async def run(self, inbox: Inbox[Event], outbox: Outbox[Session]) -> None:
        """Serve until the inbox ends."""
        while events := await take(inbox, 32):
            for event in events:
                self._switch.deliver(event)
                if (session := self._switch.live.get(event.session)) is not None:
                    outbox.send_nowait(session)
