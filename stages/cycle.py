"""What the four stages of the cycle share: turns in, one thread call for all of them, sessions back.

A stage of the cycle only says three things: what it takes from a session, what is done with a batch of that in its
worker, and what the session is given of the result. Everything that can go wrong between is settled here, once.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from .errors import InvariantBroken, WorkerLost
from .messages import Turn
from .request import Status
from .session import Session
from .stage import Inbox, Outbox, Worker, take

LOG = logging.getLogger("ralmspec.stages")
FATAL = (WorkerLost, InvariantBroken)
"""Nobody's fault among the sessions: the stage dies of it, and the engine with the stage (R10)."""

Work = TypeVar("Work")
Result = TypeVar("Result")


class CycleStage(Generic[Work, Result]):
    """A stage that serves turns; `batch` of them at most share one thread call."""

    def __init__(
        self, sessions: Mapping[int, Session], worker: Worker, now: Callable[[], float], *, batch: int = 32
    ) -> None:
        self._sessions = sessions  # looking one up may end it, if its deadline has passed
        self._worker = worker
        self._now = now
        self._batch = batch

    def take(self, session: Session, turn: Turn) -> Work | None:
        """A section (synchronous, on the loop: R2): what there is to do for this session now, if anything."""
        raise NotImplementedError

    def at_once(self, work: Work) -> Result | None:
        """On the loop: the result, if it can be had without the worker."""
        return None

    def work(self, batch: list[Work]) -> list[Result | Exception]:
        """In the worker: a result for each, in order; an exception stands for the fault of one session alone.

        One that is raised does not say whose fault it is, so each member of the batch then gets a batch of its own.
        """
        raise NotImplementedError

    def give(self, session: Session, work: Work, result: Result, turn: Turn, start: float) -> None:
        """A section: take in the result, which may be stale by now. `turn.issued` to now is how long it took, waiting
        included, `start` to now without."""
        raise NotImplementedError

    def bear(self, session: Session, work: Work, fault: Exception) -> None:
        """A section: what a fault of this work, which is not stale, means for the session; raised, it is its end."""
        raise fault

    async def run(self, inbox: Inbox[Turn], outbox: Outbox[Session]) -> None:
        """Serve until the inbox ends."""
        while turns := await take(inbox, self._batch):
            await self._serve(turns, outbox)

    async def _serve(self, turns: list[Turn], outbox: Outbox[Session]) -> None:
        # A turn keeps its session live (R6), so the look-up cannot fail; the objects are held because the table may
        # change during the call.
        at_hand = [(turn, self._sessions[turn.session]) for turn in turns]
        taken: list[tuple[Turn, Session, Work]] = []
        try:
            for turn, session in at_hand:
                if not session.is_stale(turn.epoch):  # R4
                    with _fault_of(session):
                        if (work := self.take(session, turn)) is None:
                            continue
                        if (result := self.at_once(work)) is None:
                            taken.append((turn, session, work))
                        else:
                            self.give(session, work, result, turn, self._now())
            if taken:
                await self._call(taken)
        finally:
            send_home(at_hand, outbox)

    async def _call(self, taken: Sequence[tuple[Turn, Session, Work]]) -> None:
        """One call for all of them; if it raises, one for each alone, and whose own call raises bears it (R10)."""
        start = self._now()
        outcomes: Sequence[Result | Exception] | None = None
        try:
            outcomes = await self._worker.call(self.work, [work for _, _, work in taken])
        except FATAL:
            raise
        except Exception as error:
            if len(taken) == 1:
                outcomes = [error]
            else:
                what = f"{type(error).__name__}: {error}"  # as text: a log may keep it, but not what the error holds
                LOG.warning("a call for %d sessions raised %s; each gets a call of its own", len(taken), what)
        if outcomes is None:
            for turn, session, work in taken:
                # Looked up anew, since that also ends a session whose deadline has passed meanwhile.
                if not self._sessions[turn.session].is_stale(turn.epoch):
                    await self._call([(turn, session, work)])
            return
        for (turn, session, work), outcome in zip(taken, outcomes, strict=True):
            with _fault_of(session):
                if not isinstance(outcome, Exception):
                    self.give(session, work, outcome, turn, start)
                elif not session.is_stale(turn.epoch):  # what nobody wants any more cannot fail either (R4)
                    self.bear(session, work, outcome)


def send_home(at_hand: Iterable[tuple[Turn, Session]], outbox: Outbox[Session]) -> None:
    """These turns are over, whatever became of them."""
    for turn, session in at_hand:
        session.come_home(turn)
        outbox.send_nowait(session)


class _fault_of:  # reads as a clause: with _fault_of(session)
    """An exception inside fails this session, and nobody else (R10)."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception) or isinstance(error, FATAL):
            return False
        self._session.finish(Status.FAILED, error)
        return True
