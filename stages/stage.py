"""What a stage is: one job, done for all sessions, between an inbox and an outbox.

    class Stage[In, Out]:
        async def run(inbox, outbox)

The four stages of the cycle (Lookup, Generate, Verify, Prefetch) receive `Turn`s and give back `Session`s: their outbox
is the `Switch`, which sends each session on to where it is due. What they share stands in `cycle.py`. A stage on the
path of committed output receives and sends `Event`s.
"""

from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeVar, TypeVarTuple

import anyio

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)
Item_contra = TypeVar("Item_contra", contravariant=True)
In = TypeVar("In", contravariant=True)  # a stage that takes any event may stand where fewer kinds come
Out = TypeVar("Out", covariant=True)
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class Inbox(Protocol[Item_co]):
    """The receiving end of a bounded stream (anyio's `MemoryObjectReceiveStream` is one)."""

    async def receive(self) -> Item_co:
        """Wait for the next item; `anyio.EndOfStream` when the other end has closed."""
        ...

    def receive_nowait(self) -> Item_co:
        """The next item, or `anyio.WouldBlock`."""
        ...

    def __aiter__(self) -> AsyncIterator[Item_co]:
        """Items until the other end has closed."""
        ...


class Outbox(Protocol[Item_contra]):
    """Where a stage puts what it has finished (anyio's `MemoryObjectSendStream` is one, the `Switch` another)."""

    def send_nowait(self, item: Item_contra, /) -> None:
        """Pass the item on without waiting."""
        ...

    async def send(self, item: Item_contra, /) -> None:
        """Pass the item on, waiting for room."""
        ...


class Stage(Protocol[In, Out]):
    """One job for all sessions. It lives as long as `run`, which returns when its inbox ends.

    An exception that leaves `run` is the death of the engine (R10). A stage of the output path may change, drop or add
    events, but keeps each session's events in order and always passes on its `Done`; it passes events on with
    `await outbox.send(event)`.
    """

    async def run(self, inbox: Inbox[In], outbox: Outbox[Out]) -> None:
        """Serve until the inbox ends."""
        ...


class Worker(Protocol):
    """Where blocking work happens: a real thread, or in tests a virtual delay. Stages know threads only as this."""

    async def call(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Run `work(*arguments)` elsewhere; its result or exception comes back.

        A call that has started runs to its end: cancelling waits for it. Raises `WorkerLost` if it is abandoned.
        """
        ...

    def oldest_call(self) -> float:
        """When the longest of the running calls began, by the event loop's clock; infinity if none runs."""
        ...

    def abandon(self) -> None:
        """Give up waiting for running calls: they raise `WorkerLost` where they were called."""
        ...

    def close(self, timeout_s: float) -> bool:
        """End; whether everything ended within the time."""
        ...


async def take(inbox: Inbox[Item], limit: float = float("inf"), *, wait: bool = True) -> list[Item]:
    """Wait for one item, then take what else is already there, at most `limit` in all; empty when the inbox ended.

    What is already there is taken without giving up the loop; whoever serves it does that soon enough. Without `wait`
    only what is there is taken, which may be nothing.
    """
    items: list[Item] = []
    try:
        while len(items) < limit:
            items.append(inbox.receive_nowait())
    except anyio.WouldBlock:
        pass
    except anyio.EndOfStream:
        return items
    if wait and not items:
        try:
            items.append(await inbox.receive())
        except anyio.EndOfStream:
            return []
    return items
