"""What a pipeline can be given: one arrangement for all its sessions, or what chooses among several."""

from typing import Protocol, runtime_checkable

from ralmspec.stages.arrangement import Arrangement
from ralmspec.stages.request import Request
from ralmspec.stages.statistics import Statistics


@runtime_checkable
class Chooser(Protocol):
    """Picks an arrangement for each session of one pipeline. Both methods run on the event loop and must be quick."""

    @property
    def window(self) -> int:
        """The largest window of what it may choose."""
        ...

    @property
    def flights(self) -> int:
        """The most flights of what it may choose."""
        ...

    def choose(self, request: Request) -> Arrangement:
        """The arrangement for the next steps of a session that begins now, or has just gone a stretch."""
        ...

    def learn(self, request: Request, arrangement: Arrangement, statistics: Statistics) -> None:
        """What a stretch of a session's steps took that was served so: a session goes several (`Stretches`). The last
        one counts if the session has ended well, or has missed its deadline."""
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
