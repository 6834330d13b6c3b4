"""Errors that a caller of the pipeline can meet, beside those of the layers below.

RalmspecError
├── Overloaded        there is no room, and waiting would be in vain; try again later
├── NotServing        the pipeline is not open (not entered yet, draining, or closed)
├── Cancelled         the session was ended from outside while somebody read it
├── DeadlineExceeded  the session's deadline came first
├── Stalled           the watchdog found a session that could act and did not
└── EngineDead        a stage died or a call hung; every session has ended with this, open a new pipeline
"""

from ralmspec.retrievers.errors import RalmspecError


class Overloaded(RalmspecError):
    """Slots or KV memory are taken, and the waiting room is full too, or the deadline would pass in it.

    The message says which. `retry_after_s` is a hint: by then, as things go, all who wait now will have been let in.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotServing(RalmspecError):
    """The pipeline is not open for new sessions, or was closed before this one ended."""


class Cancelled(RalmspecError):
    """The session was ended by its own `cancel`, maybe while it waited to begin."""


class DeadlineExceeded(RalmspecError):
    """The session did not end, or could not begin, before its deadline."""


class Stalled(RalmspecError):
    """A session that could act made no progress for too long; the message says what was out."""


class EngineDead(RalmspecError):
    """A stage of the pipeline died; nothing can be served any more."""
