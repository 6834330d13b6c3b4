"""Sees what is late: deadlines, calls that hang, and sessions for which nothing happens although it could (R12)."""

from collections.abc import Callable, Collection, Iterator, Mapping

import anyio

from ralmspec.stages.session import Session
from ralmspec.stages.stage import Worker
from ralmspec.stages.switch import Switch

from .errors import DeadlineExceeded, Stalled
from .limits import Limits

Fail = Callable[[Session, BaseException], None]

PAUSE_S = 1.0
"""A look that comes later than this after it was due tells of a loop that did not turn, or of a clock that jumped."""


class Watchdog:
    """Looks at every live session and every running call at the next instant at which one of them could be late.

    `fail` ends a session with an error. A call that hangs is abandoned: its stage dies of that, and the engine with it.
    Time in which the loop itself did not turn, or which a clock's jump made up, only makes deadlines pass.
    """

    def __init__(self, switch: Switch, workers: Collection[Worker], limits: Limits, fail: Fail) -> None:
        self._switch = switch
        self._workers = workers
        self._limits = limits
        self._fail = fail
        self._due = float("inf")  # the next look
        self._resumed = float("-inf")  # when the loop last turned again after a pause

    def look(self) -> float:
        """Deal with what is late; when to look again, unless a session comes or goes before. Loop's clock, seconds."""
        now = anyio.current_time()
        if now > self._due + PAUSE_S:
            self._resumed = now
        for worker in self._workers:
            if self._begun(worker) + self._limits.call_s <= now:
                worker.abandon()
        for session in self._live():
            if session.request.deadline <= now:
                self._fail(session, late())
            elif self._stalls_at(session) <= now:
                self._fail(session, Stalled(f"nothing happened for {self._limits.stall_s:g} s: {session}"))
        instants = [min(session.request.deadline, self._stalls_at(session)) for session in self._live()]
        if self._switch.live:  # calls belong to sessions; one that begins later cannot be late earlier
            instants.append(min(now, *(self._begun(worker) for worker in self._workers)) + self._limits.call_s)
        self._due = max(min(instants, default=float("inf")), now + 1e-3)
        return self._due

    def _live(self) -> list[Session]:
        return [session for session in self._switch.live.values() if not session.final]

    def _begun(self, worker: Worker) -> float:
        """When its longest running call began, as far as it counts; infinity if none runs."""
        return max(worker.oldest_call(), self._resumed)

    def _stalls_at(self, session: Session) -> float:
        """When the session counts as stalled if nothing happens until then.

        One that waits for its reader does not stall (that is its deadline's business), and one that waits for a stage
        only if no stage gets on and no call is running (that one has `call_s`).
        """
        limit = self._limits.stall_s
        since = max(session.progress, session.reader.returned, self._resumed)
        if session.home and not session.reader.blocks:
            return since + limit
        if session.reader.blocks or any(worker.oldest_call() < float("inf") for worker in self._workers):
            return anyio.current_time() + limit
        return max(since, self._switch.progress) + limit


class OnTime(Mapping[int, Session]):
    """The live sessions, for stages to take their work from: one that is late is ended when a stage asks for it.

    The watchdog alone would be too late now and then: its timer and a stage's turn may fall into the same instant, or
    both come after the loop was busy, and then the stage may be the first to run.
    """

    def __init__(self, live: Mapping[int, Session], fail: Fail) -> None:
        self._live = live
        self._fail = fail

    def __getitem__(self, id: int) -> Session:
        session = self._live[id]
        if not session.final and session.request.deadline <= anyio.current_time():
            self._fail(session, late())
        return session

    def __iter__(self) -> Iterator[int]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)


def late() -> DeadlineExceeded:
    """What a session whose deadline has passed ends with."""
    return DeadlineExceeded("the session did not end before its deadline")
