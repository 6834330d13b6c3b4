"""Generate: one forward pass after another, for whichever sessions have their turn.

Between two passes the loop is free, so a rollback takes effect at the next token: the pass that was running is
dropped by its epoch, and the session's next pass continues the true prefix.
"""

from collections.abc import Callable, Mapping

from .errors import ModelFailed
from .messages import Pass, Turn
from .model import LanguageModel, Prefix
from .session import Session, Status
from .stage import Inbox, Outbox, Worker, take
from .workload import BoundWorkload


class Generate:
    """Decodes. Every thread call is one forward pass for up to `model.max_batch` sessions."""

    def __init__(
        self,
        sessions: Mapping[int, Session],
        model: LanguageModel,
        workload: BoundWorkload,
        worker: Worker,
        now: Callable[[], float],
    ) -> None:
        self._sessions = sessions
        self._model = model
        self._workload = workload
        self._worker = worker
        self._now = now

    async def run(self, inbox: Inbox[Turn], outbox: Outbox[Session]) -> None:
        """Serve until the inbox ends."""
        while turns := await take(inbox, self._model.max_batch):
            await self._serve(turns, outbox)

    async def _serve(self, turns: list[Turn], outbox: Outbox[Session]) -> None:
        start = self._now()
        work: list[tuple[Turn, Session, Pass]] = []
        try:
            for turn in turns:
                session = self._sessions[turn.session]
                if (made := session.next_pass()) is not None:
                    work.append((turn, session, made))
            if work:
                results = await self._worker.call(self._forward, [made for _, _, made in work])
                for (turn, session, made), result in zip(work, results, strict=True):
                    session.returned(turn)
                    session.span("generate", start, stale=session.is_stale(made.epoch), made=made)
                    if isinstance(result, Exception):
                        session.finish(Status.FAILED, result)
                    else:
                        session.decoded(made, result)
        except Exception as error:  # the batch's fault fails its members (R10)
            for _, session, _ in work:
                session.finish(Status.FAILED, error)
        finally:
            for turn in turns:
                session = self._sessions[turn.session]
                if session.turn_out:
                    session.returned(turn)
                outbox.send_nowait(session)

    def _forward(self, passes: list[Pass]) -> list[int | Exception]:
        """In the worker: prefixes, one forward pass, tokens. A fault of one session stands in its place."""
        outcomes: dict[int, int | Exception] = {}
        prefixes: list[Prefix] = []
        members: list[int] = []
        for place, made in enumerate(passes):
            try:
                tokens = self._workload.prefix(made.context, made.retrieved)
                prefixes.append(Prefix(session=made.session, tokens=tokens))
                members.append(place)
            except Exception as error:
                outcomes[place] = error
        if prefixes:
            try:
                frontiers = self._model.forward(prefixes)
            except ModelFailed:
                raise
            except Exception as error:
                raise ModelFailed(f"the forward pass raised {type(error).__name__}: {error}") from error
            for place, frontier in zip(members, frontiers, strict=True):
                made = passes[place]
                try:
                    outcomes[place] = self._workload.choose(frontier, made.retrieved, made.position, made.sampling)
                except Exception as error:
                    outcomes[place] = error
        return [outcomes[place] for place in range(len(passes))]
