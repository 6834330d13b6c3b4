"""Verify: puts the checks that are due to the knowledge base, all in one search, and brings the verdicts back.

A session's first retrieval, before which nothing can be guessed, comes this way too.
"""

from collections.abc import Callable, Mapping

import numpy as np

from ralmspec.retrievers.base import Ids, Ranking, Retriever
from ralmspec.retrievers.errors import RetrieverFailed

from .cycle import CycleStage
from .messages import Check, Turn, Verdict
from .session import Session
from .stage import Worker
from .workload import BoundWorkload

Batch = tuple[Check, ...]


class Verify(CycleStage[Batch, list[Verdict]]):
    """Asks the knowledge base. `run` may be started as often as the retriever allows searches at once.

    Documents that condition a step are in the session's cache before the session acts on the verdict; the wide rest
    goes through Prefetch.
    """

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

    def take(self, session: Session, turn: Turn) -> Batch | None:
        """The checks that were launched."""
        return session.take_checks(turn)

    def work(self, batch: list[Batch]) -> list[list[Verdict] | Exception]:
        """One search for the checks of all sessions, validated here at the edge; then what it says of each guess."""
        queries = [check.query for checks in batch for check in checks]
        k = max(check.documents for checks in batch for check in checks)
        try:
            rankings = self._retriever.search(queries, k)
            if len(rankings) != len(queries):
                raise RetrieverFailed(f"{len(queries)} queries were asked, {len(rankings)} rankings came back")
            for ranking in rankings:
                validate(ranking, k)
        except RetrieverFailed:
            raise
        except Exception as error:
            raise RetrieverFailed(f"the search raised {type(error).__name__}: {error}") from error
        truths = iter(rankings)
        verdicts: list[list[Verdict] | Exception] = []
        for checks in batch:
            found = [(check, next(truths)) for check in checks]
            try:
                verdicts.append(self._verdicts(found))
            except Exception as error:
                verdicts.append(error)
        return verdicts

    def _verdicts(self, found: list[tuple[Check, Ranking]]) -> list[Verdict]:
        right = [
            check.guess is not None and self._workload.agree(check, truth.top(self._workload.top_k))
            for check, truth in found
        ]
        wrong = [n for n, (check, _) in enumerate(found) if check.guess is not None and not right[n]]
        stand = wrong[0] + 1 if wrong else len(found)
        # What is found after a wrong guess enters the cache too: it is true of its query, whatever became of the step,
        # so guesses and proofs may rest on it. But first, so as not to stay the longest.
        wanted = {n: self._remember(*found[n]) for n in [*range(stand, len(found)), *range(stand)]}
        return [
            Verdict(
                session=check.session,
                epoch=check.epoch,
                step=check.step,
                truth=truth,
                right=right[n],
                wanted=wanted[n],
            )
            for n, (check, truth) in enumerate(found)
        ]

    def _remember(self, check: Check, truth: Ranking) -> Ids:
        """What conditions the step enters the cache, and the search is kept for proofs. Returns what else should be
        there: until Prefetch has brought that, the search proves nothing."""
        if (cache := check.cache) is None:
            return truth.ids[:0]
        top = truth.ids[: self._workload.top_k]
        try:
            cache.insert(top, self._retriever.rows(top))
        except RetrieverFailed:
            raise
        except Exception as error:
            raise RetrieverFailed(f"reading rows raised {type(error).__name__}: {error}") from error
        cache.searched(check.query, truth)
        return cache.missing(self._workload.around(truth.ids))

    def give(self, session: Session, work: Batch, result: list[Verdict], turn: Turn, start: float) -> None:
        """Verdicts: commit or rollback."""
        session.span("verify", start, step=work[0].step, epoch=turn.epoch, note=f"{len(work)} checks")
        now = self._now()
        session.judge(result, search_s=now - start, verification_s=now - turn.issued)


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
