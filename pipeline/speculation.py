"""What a pipeline can be given: one arrangement for all its sessions, or what chooses for each, stretch by stretch."""

from typing import Protocol, runtime_checkable

from ralmspec.stages.arrangement import Arrangement
from ralmspec.stages.request import Request
from ralmspec.stages.statistics import Statistics


@runtime_checkable
class Chooser(Protocol):
    """Picks arrangements for the sessions of one pipeline. Both methods run on the event loop and must be quick."""

    @property
    def window(self) -> int:
        """The largest window of what it may choose."""
        ...

    @property
    def flights(self) -> int:
        """The most flights of what it may choose."""
        ...

    def choose(self, request: Request) -> Arrangement:
        """The arrangement of a session that begins now, or of what comes after a stretch of its steps (`Stretches`)."""
        ...

    def learn(self, request: Request, arrangement: Arrangement, statistics: Statistics) -> None:
        """What a stretch of a session's steps took in `arrangement`; a long session has many. What is left at its end
        (`Stretches.rest`) counts if it has ended well, or has missed its deadline or stalled."""
        ...


Speculation = Arrangement | Chooser
"""What a pipeline can be given: an arrangement for all its sessions, or what chooses one for each."""


class Always:
    """The same arrangement for every session."""

    def __init__(self, arrangement: Arrangement) -> None:
        self.window = arrangement.window
        self.flights = arrangement.flights
        self._arrangement = arrangement

    def choose(self, request: Request) -> Arrangement:
        """It."""
        return self._arrangement

    def learn(self, request: Request, arrangement: Arrangement, statistics: Statistics) -> None:
        """Nothing to learn."""
