"""Verify: puts the checks that are due to the knowledge base, all in one search, and brings the verdicts back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ralmspec.retrievers.base import Query, Ranking, Retriever
from ralmspec.retrievers.errors import RetrieverFailed

from .messages import Check, Turn, Verdict
from .session import Session, Status
from .stage import Inbox, Outbox, Worker, take


class Verify:
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
        batch: int = 32,
    ) -> None:
        self._sessions = sessions
        self._retriever = retriever
        self._worker = worker
        self._now = now
        self._k = k
        self._keep = keep
        self._batch = batch

    async def run(self, inbox: Inbox[Turn], outbox: Outbox[Session]) -> None:
        """Serve until the inbox ends."""
        while turns := await take(inbox, self._batch):
            await self._serve(turns, outbox)

    async def _serve(self, turns: list[Turn], outbox: Outbox[Session]) -> None:
        due: list[tuple[Session, list[Check]]] = []
        try:
            for turn in turns:
                session = self._sessions[turn.session]
                session.checking_out = False
                if checks := session.take_checks():
                    due.append((session, checks))
            if due:
                start = self._now()
                found = await self._worker.call(self._search, [check.query for _, checks in due for check in checks])
                seconds = self._now() - start
                place = 0
                for session, checks in due:
                    verdicts = [
                        Verdict(session=c.session, epoch=c.epoch, step=c.step, truth=truth, rows=rows)
                        for c, (truth, rows) in zip(checks, found[place : place + len(checks)], strict=True)
                    ]
                    place += len(checks)
                    session.span("verify", start, note=f"{len(checks)} checks", step=checks[0].step)
                    session.judge(verdicts, seconds)
        except Exception as error:  # the batch's fault fails its members (R10)
            for session, _ in due:
                session.finish(Status.FAILED, error)
        finally:
            for session, checks in due:
                session.credits_returned(len(checks))  # R5: whatever happened to them
            for turn in turns:
                outbox.send_nowait(self._sessions[turn.session])

    def _search(self, queries: Sequence[Query]) -> list[tuple[Ranking, NDArray[Any] | None]]:
        """In the worker: one search, checked at the edge, and the rows that go with the verdicts."""
        try:
            rankings = self._retriever.search(queries, self._k)
            if len(rankings) != len(queries):
                raise RetrieverFailed(f"{len(queries)} queries were asked, {len(rankings)} rankings came back")
            for ranking in rankings:
                refuse(ranking, self._k)
            return [(r, self._retriever.rows(r.ids[: self._keep]) if self._keep else None) for r in rankings]
        except RetrieverFailed:
            raise
        except Exception as error:
            raise RetrieverFailed(f"the search raised {type(error).__name__}: {error}") from error


def refuse(ranking: Ranking, k: int) -> None:
    """Raise `RetrieverFailed` for anything that is not a ranking of 1 to k documents, ties in ascending id."""
    ids, scores = ranking.ids, ranking.scores
    if ids.ndim != 1 or ids.shape != scores.shape or not 1 <= len(ids) <= k:
        raise RetrieverFailed(
            f"a ranking of 1 to {k} documents was expected, got ids {ids.shape}, scores {scores.shape}"
        )
    if not np.isfinite(scores).all():
        raise RetrieverFailed("a ranking holds a score that is not a finite number")
    ordered = (scores[:-1] > scores[1:]) | ((scores[:-1] == scores[1:]) & (ids[:-1] < ids[1:]))
    if not ordered.all():
        raise RetrieverFailed("a ranking is not ordered by descending score, then ascending id")
