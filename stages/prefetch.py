"""Prefetch: fills the sessions' caches with the wide rest of what searches have found, beside everything else."""

from collections.abc import Callable, Mapping

from ralmspec.retrievers.base import Ids, Retriever
from ralmspec.retrievers.cache import SessionCache
from ralmspec.retrievers.errors import RetrieverFailed

from .cycle import LOG, CycleStage
from .messages import Turn
from .session import Session
from .stage import Worker

_PIECE = 1024  # documents

Wanted = tuple[SessionCache, Ids]


class Prefetch(CycleStage[Wanted, int]):
    """Fetches rows by id. Late, dropped or failed work costs guesses and proofs, never outputs."""

    def __init__(
        self, sessions: Mapping[int, Session], retriever: Retriever, worker: Worker, now: Callable[[], float]
    ) -> None:
        super().__init__(sessions, worker, now)
        self._retriever = retriever

    def take(self, session: Session, turn: Turn) -> Wanted | None:
        """Documents for the session's cache."""
        ids = session.take_wanted()
        return (session.cache, ids) if len(ids) else None

    def work(self, batch: list[Wanted]) -> list[int | Exception]:
        """Those that the cache lacks by now, as many as it holds."""
        try:
            return [self._fetch(cache, ids) for cache, ids in batch]
        except RetrieverFailed:
            raise
        except Exception as error:
            raise RetrieverFailed(f"reading rows raised {type(error).__name__}: {error}") from error

    def _fetch(self, cache: SessionCache, ids: Ids) -> int:
        missing = cache.missing(ids)[: cache.capacity]
        # In pieces, so that a look-up need not wait for all of it; the best last, so that it counts as the newest.
        for start in reversed(range(0, len(missing), _PIECE)):
            piece = missing[start : start + _PIECE]
            cache.insert(piece, self._retriever.rows(piece))
        return len(missing)

    def give(self, session: Session, work: Wanted, result: int, turn: Turn, start: float) -> None:
        """What was fetched is in the cache."""
        session.span("prefetch", start, epoch=turn.epoch, note=f"{result} documents")

    def bear(self, session: Session, work: Wanted, fault: Exception) -> None:
        """Nothing but guesses is lost: Verify reads the rows that count itself, and fails if they cannot be read."""
        LOG.warning("prefetching failed, which costs guesses: %s", str(fault))
