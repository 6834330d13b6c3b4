"""Errors that a caller of the pipeline can meet, beside those of the layers below.

RalmspecError
├── Overloaded        every slot is taken; try again later
├── NotServing        the pipeline is not open (not entered yet, draining, or closed)
├── Cancelled         the session was ended from outside while somebody read it
├── DeadlineExceeded  the session's deadline came first
├── Stalled           the watchdog found a session that could act and did not
└── EngineDead        a stage died or a call hung; every session has ended with this, open a new pipeline
"""

from ralmspec.retrievers.errors import RalmspecError


class Overloaded(RalmspecError):
    """Every slot is taken. `retry_after_s` is a hint: the mean time a session has taken lately."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotServing(RalmspecError):
    """The pipeline is not open for new sessions, or was closed before this one ended."""


class Cancelled(RalmspecError):
    """The session was ended by its own `cancel`."""


class DeadlineExceeded(RalmspecError):
    """The session did not end before its deadline."""


class Stalled(RalmspecError):
    """A session that could act made no progress for too long; the message says what was out."""


class EngineDead(RalmspecError):
    """A stage of the pipeline died; nothing can be served any more."""
