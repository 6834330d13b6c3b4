"""Prefetch: fills the sessions' caches with the wide rest of what searches have found, beside everything else."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ralmspec.retrievers.base import Ids, Retriever

from .messages import Turn
from .session import Session, Status
from .stage import Inbox, Outbox, Worker, take


class Prefetch:
    """Fetches rows by id. Late or dropped work costs guesses, never outputs."""

    def __init__(
        self,
        sessions: Mapping[int, Session],
        retriever: Retriever,
        worker: Worker,
        now: Callable[[], float],
        batch: int = 32,
    ) -> None:
        self._sessions = sessions
        self._retriever = retriever
        self._worker = worker
        self._now = now
        self._batch = batch

    async def run(self, inbox: Inbox[Turn], outbox: Outbox[Session]) -> None:
        """Serve until the inbox ends."""
        while turns := await take(inbox, self._batch):
            await self._serve(turns, outbox)

    async def _serve(self, turns: list[Turn], outbox: Outbox[Session]) -> None:
        start = self._now()
        wanted: list[tuple[Session, Ids]] = []
        try:
            for turn in turns:
                session = self._sessions[turn.session]
                if len(ids := session.take_wanted()):
                    wanted.append((session, ids))
            if wanted:
                fetched = await self._worker.call(self._rows, [ids for _, ids in wanted])
                for (session, ids), rows in zip(wanted, fetched, strict=True):
                    session.fetched(ids, rows)
                    session.span("prefetch", start, note=f"{len(ids)} documents")
        except Exception as error:  # the batch's fault fails its members (R10)
            for session, _ in wanted:
                session.finish(Status.FAILED, error)
        finally:
            for turn in turns:
                session = self._sessions[turn.session]
                session.fetching_out = False
                outbox.send_nowait(session)

    def _rows(self, wanted: list[Ids]) -> list[NDArray[Any]]:
        """In the worker: one read for all, then a part for each."""
        rows = self._retriever.rows(np.concatenate(wanted))
        return np.split(rows, np.cumsum([len(ids) for ids in wanted])[:-1])
