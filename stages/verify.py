"""Verify: puts the checks that are due to the knowledge base, all in one search, and brings the verdicts back.

A session's first retrieval, before which nothing can be guessed, comes this way too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ralmspec.retrievers.base import Ranking, Retriever
from ralmspec.retrievers.errors import RetrieverFailed

from .cycle import CycleStage
from .messages import Check, Turn, Verdict
from .session import Session
from .stage import Worker

Found = list[tuple[Ranking, NDArray[Any] | None]]


class Verify(CycleStage[list[Check], Found]):
    """Asks the knowledge base. `run` may be started as often as the retriever allows searches at once.

    `k` documents are asked for; `keep` of them (those that condition a step) come with their rows, so that they are in
    the session's cache before the session acts on the verdict. `keep` = 0 where no cache is used.
    """

    def __init__(
        self,
        sessions: Mapping[int, Session],
        retriever: Retriever,
        worker: Worker,
        now: Callable[[], float],
        *,
        k: int,
        keep: int,
    ) -> None:
        super().__init__(sessions, worker, now)
        self._retriever = retriever
        self._k = k
        self._keep = keep

    def take(self, session: Session) -> list[Check] | None:
        """The checks that were launched."""
        return session.take_checks() or None

    def work(self, batch: list[list[Check]]) -> list[Found | Exception]:
        """One search for the checks of all sessions, validated here at the edge."""
        queries = [check.query for checks in batch for check in checks]
        try:
            rankings = self._retriever.search(queries, self._k)
            if len(rankings) != len(queries):
                raise RetrieverFailed(f"{len(queries)} queries were asked, {len(rankings)} rankings came back")
            for ranking in rankings:
                validate(ranking, self._k)
            found = iter([(r, self._retriever.rows(r.ids[: self._keep]) if self._keep else None) for r in rankings])
        except RetrieverFailed:
            raise
        except Exception as error:
            raise RetrieverFailed(f"the search raised {type(error).__name__}: {error}") from error
        return [[next(found) for _ in checks] for checks in batch]

    def give(self, session: Session, work: list[Check], result: Found, turn: Turn, start: float) -> None:
        """Verdicts: commit or rollback."""
        session.span("verify", start, step=work[0].step, epoch=turn.epoch, note=f"{len(work)} checks")
        verdicts = [
            Verdict(session=check.session, epoch=check.epoch, step=check.step, truth=truth, rows=rows)
            for check, (truth, rows) in zip(work, result, strict=True)
        ]
        now = self._now()
        session.judge(verdicts, search_s=now - start, verification_s=now - turn.issued)


def validate(ranking: Ranking, k: int) -> None:
    """Raise `RetrieverFailed` for anything that is not a ranking of 1 to k documents, ties in ascending id."""
    ids, scores = ranking.ids, ranking.scores
    if ids.ndim != 1 or ids.shape != scores.shape or not 1 <= len(ids) <= k:
        raise RetrieverFailed(
            f"a ranking of 1 to {k} documents was expected; ids are {ids.shape}, scores {scores.shape}"
        )
    if not np.isfinite(scores).all():
        raise RetrieverFailed("a ranking holds a score that is not a finite number")
    ordered = (scores[:-1] > scores[1:]) | ((scores[:-1] == scores[1:]) & (ids[:-1] < ids[1:]))
    if not ordered.all():
        raise RetrieverFailed("a ranking is not ordered by descending score, then ascending id")
