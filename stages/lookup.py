"""Lookup: forms the next query of a session, has it encoded once, and guesses its document from the session's cache."""

from collections.abc import Callable, Mapping

from ralmspec.retrievers.base import Query, Retriever
from ralmspec.retrievers.errors import RetrieverFailed

from .messages import Turn
from .session import Session, Status
from .stage import Inbox, Outbox, Worker, take


class Lookup:
    """Begins steps. One encoder call serves every session whose turn it is."""

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
        asked: list[tuple[Turn, Session, Query]] = []
        try:
            for turn in turns:
                session = self._sessions[turn.session]
                if session.is_stale(turn.epoch):
                    continue
                try:
                    asked.append((turn, session, session.asked()))
                except Exception as error:  # one session's fault fails that session (R10)
                    session.finish(Status.FAILED, error)
            if asked:
                encoded = await self._worker.call(self._encode, [query for _, _, query in asked])
                for (turn, session, _), query in zip(asked, encoded, strict=True):
                    session.looked(turn.epoch, query)
                    session.span("lookup", start)
        except Exception as error:  # the batch's fault fails its members (R10)
            for _, session, _ in asked:
                session.finish(Status.FAILED, error)
        finally:
            for turn in turns:
                session = self._sessions[turn.session]
                session.returned(turn)
                outbox.send_nowait(session)

    def _encode(self, queries: list[Query]) -> list[Query]:
        try:
            return self._retriever.encode(queries)
        except RetrieverFailed:
            raise
        except Exception as error:
            raise RetrieverFailed(f"encoding a query raised {type(error).__name__}: {error}") from error
