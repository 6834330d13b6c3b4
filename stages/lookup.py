"""Lookup: forms the next query of a session, has it encoded once, and guesses its document from the session's cache."""

from collections.abc import Callable, Mapping

from ralmspec.retrievers.base import Query, Retriever
from ralmspec.retrievers.errors import RetrieverFailed

from .cycle import CycleStage
from .messages import Turn
from .session import Session
from .stage import Worker
from .step import Move


class Lookup(CycleStage[Query, Query]):
    """Begins steps. One encoder call serves every session whose turn it is."""

    def __init__(
        self, sessions: Mapping[int, Session], retriever: Retriever, worker: Worker, now: Callable[[], float]
    ) -> None:
        super().__init__(sessions, worker, now)
        self._retriever = retriever

    def take(self, session: Session) -> Query | None:
        """The next step's query, as text."""
        return session.question() if session.move is Move.LOOK else None

    def work(self, batch: list[Query]) -> list[Query | Exception]:
        """Encode."""
        try:
            return [*self._retriever.encode(batch)]
        except RetrieverFailed:
            raise
        except Exception as error:
            raise RetrieverFailed(f"encoding a query raised {type(error).__name__}: {error}") from error

    def give(self, session: Session, work: Query, result: Query, turn: Turn, start: float) -> None:
        """A step begins, under the cache's best guess if there is one."""
        session.looked(turn.epoch, result, self._now() - turn.issued)
        session.span("lookup", start, epoch=turn.epoch)
