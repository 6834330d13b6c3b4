"""Prefetch: fills the sessions' caches with the wide rest of what searches have found, beside everything else."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ralmspec.retrievers.base import Ids, Retriever
from ralmspec.retrievers.errors import RetrieverFailed

from .cycle import CycleStage
from .messages import Turn
from .session import Session
from .stage import Worker


class Prefetch(CycleStage[Ids, NDArray[Any]]):
    """Fetches rows by id. Late or dropped work costs guesses, never outputs."""

    def __init__(
        self, sessions: Mapping[int, Session], retriever: Retriever, worker: Worker, now: Callable[[], float]
    ) -> None:
        super().__init__(sessions, worker, now)
        self._retriever = retriever

    def take(self, session: Session) -> Ids | None:
        """Documents that the session's cache lacks."""
        ids = session.take_wanted()
        return ids if len(ids) else None

    def work(self, batch: list[Ids]) -> list[NDArray[Any] | Exception]:
        """One read for all, then a part for each."""
        try:
            rows = self._retriever.rows(np.concatenate(batch))
        except RetrieverFailed:
            raise
        except Exception as error:
            raise RetrieverFailed(f"reading rows raised {type(error).__name__}: {error}") from error
        return [*np.split(rows, np.cumsum([len(ids) for ids in batch])[:-1])]

    def give(self, session: Session, work: Ids, result: NDArray[Any], turn: Turn, start: float) -> None:
        """Rows for the cache."""
        session.fetched(work, result)
        session.span("prefetch", start, epoch=turn.epoch, note=f"{len(work)} documents")
