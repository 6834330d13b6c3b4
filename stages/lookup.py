"""Lookup: forms the next query of a session, has it encoded once, and guesses its document from the session's cache."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ralmspec.retrievers.base import Query, Ranking, Retriever
from ralmspec.retrievers.cache import SessionCache
from ralmspec.retrievers.errors import RetrieverFailed

from .cycle import CycleStage
from .messages import Turn
from .session import Session
from .stage import Worker
from .step import Move
from .workload import BoundWorkload


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A query, and the cache to guess its documents from, if there is one."""

    query: Query
    cache: SessionCache | None


@dataclass(frozen=True, slots=True, eq=False)
class Looked:
    """The query, encoded, and the guess, if there was anything to guess from."""

    query: Query
    guess: Ranking | None


class Lookup(CycleStage[Question, Looked]):
    """Begins steps. One encoder call serves every session whose turn it is."""

    def __init__(
        self,
        sessions: Mapping[int, Session],
        retriever: Retriever,
        workload: BoundWorkload,
        worker: Worker,
        now: Callable[[], float],
    ) -> None:
        super().__init__(sessions, worker, now)
        self._retriever = retriever
        self._workload = workload

    def take(self, session: Session, turn: Turn) -> Question | None:
        """The next step's query, as text or as a vector."""
        return Question(session.question(), session.cache) if session.move is Move.LOOK else None

    def at_once(self, work: Question) -> Looked | None:
        """A query that brings its vector along needs no encoder, and without a cache there is nothing to look up."""
        return Looked(work.query, None) if work.query.vector is not None and work.cache is None else None

    def work(self, batch: list[Question]) -> list[Looked | Exception]:
        """Encode, then guess."""
        bare = [question.query for question in batch if question.query.vector is None]
        try:
            encoded = iter(self._retriever.encode(bare) if bare else ())
            queries = [question.query if question.query.vector is not None else next(encoded) for question in batch]
        except RetrieverFailed:
            raise
        except Exception as error:
            raise RetrieverFailed(f"encoding a query raised {type(error).__name__}: {error}") from error
        return [self._guess(query, question.cache) for query, question in zip(queries, batch, strict=True)]

    def _guess(self, query: Query, cache: SessionCache | None) -> Looked | Exception:
        try:
            return Looked(query, cache.best(query, self._workload.top_k) if cache is not None else None)
        except RetrieverFailed as error:
            return error
        except Exception as error:
            return RetrieverFailed(f"scoring the cache raised {type(error).__name__}: {error}")

    def give(self, session: Session, work: Question, result: Looked, turn: Turn, start: float) -> None:
        """A step begins, under the cache's best guess if there is one."""
        session.looked(turn.epoch, result.query, result.guess, self._now() - turn.issued)
        session.span("lookup", start, epoch=turn.epoch)
