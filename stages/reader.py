"""A session's caller, as the session sees it: what it is told, and how much of that it leaves unread."""

from collections.abc import Callable, Sequence

from ralmspec.retrievers.base import Ranking

from .messages import Committed, Done, Drafted, Event, RolledBack
from .request import Request
from .step import Step
from .text import TextStream
from .workload import BoundWorkload


class Reader:
    """Is told what becomes of the output, and by not reading it makes the session wait (R8)."""

    def __init__(
        self,
        session: int,
        request: Request,
        *,
        workload: BoundWorkload,
        render: Callable[[Sequence[int]], str],
        emit: Callable[[Event], None],
        now: Callable[[], float],
    ) -> None:
        self.unread = 0
        """Events on their way to the caller, or waiting for it."""
        self.returned = now()
        """When it last read after the session had waited for it; at first, when the session was admitted."""
        self._session = session
        self._workload = workload
        self._limit = request.unread_limit
        self._sees_drafts = request.drafts
        self._text = TextStream(render)
        self._emit = emit
        self._now = now
        self._left = 0.0  # when so much was unread that the session began to wait
        self._away_s = 0.0  # before that

    @property
    def blocks(self) -> bool:
        """Whether so much is unread that no new work is begun."""
        return self.unread >= self._limit

    @property
    def away_s(self) -> float:
        """How long the session has waited for it, in all."""
        return self._away_s + (self._now() - self._left if self.blocks else 0.0)

    def told(self) -> None:
        """One event more waits for the caller."""
        self.unread += 1
        if self.unread == self._limit:
            self._left = self._now()

    def heard(self) -> None:
        """One event fewer waits for the caller."""
        if self.blocks:
            self.returned = self._now()
        if self.unread == self._limit:
            self._away_s += self._now() - self._left
        self.unread -= 1

    def drafted(self, step: Step, generated: Sequence[int], retrieved: Ranking) -> None:
        """The last of the tokens `generated` so far was written under a guess."""
        if self._sees_drafts:
            text, document = self._text.newest(generated), self._workload.source(retrieved)
            self._emit(
                Drafted(session=self._session, text=text, token=generated[-1], step=step.index, document=document)
            )

    def retracted(self, step: Step, tokens: int, truth: Ranking) -> None:
        """So many of the last tokens, from the first of `step` on, are written anew."""
        if self._sees_drafts and tokens:
            document = self._workload.source(truth)
            self._emit(RolledBack(session=self._session, step=step.index, tokens=tokens, document=document))

    def committed(self, step: Step, tokens: Sequence[int], truth: Ranking, *, last: bool) -> None:
        """`step` is final, and with it `tokens`, all that have been committed so far."""
        text, document = self._text.advance(tokens, last=last), self._workload.source(truth)
        self._emit(
            Committed(session=self._session, text=text, tokens=tuple(step.tokens), step=step.index, document=document)
        )

    def ended(self, done: Done) -> None:
        """The last event."""
        self._emit(done)
