"""A session's timeline as data: who worked on which step when, and what came of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Work of one stage for one session; `end` equals `start` for an instant. Seconds of the event loop's clock."""

    session: int
    stage: str
    start: float
    end: float
    step: int
    epoch: int
    note: str = ""


class Trace:
    """Collects the spans of one session; a few for every token."""

    def __init__(self, session: int) -> None:
        self.session = session
        self.spans: list[Span] = []

    def span(self, stage: str, start: float, end: float, *, step: int, epoch: int, note: str = "") -> None:
        """Note a piece of work."""
        self.spans.append(Span(self.session, stage, start, end, step, epoch, note))

    def mark(self, stage: str, at: float, *, step: int, epoch: int) -> None:
        """Note an instant."""
        self.span(stage, at, at, step=step, epoch=epoch)
