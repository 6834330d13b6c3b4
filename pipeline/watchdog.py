"""Sees what is late: deadlines, calls that hang, and sessions for which nothing happens although it could (R12)."""

from collections.abc import Callable, Collection

import anyio

from ralmspec.stages.session import Session
from ralmspec.stages.stage import Worker
from ralmspec.stages.switch import Switch

from .errors import DeadlineExceeded, Stalled
from .limits import Limits


class Watchdog:
    """Looks at every live session and every running call at the next instant at which one of them could be late.

    `fail` ends a session with an error. A call that hangs is abandoned: its stage dies of that, and the engine with it.
    """

    def __init__(
        self,
        switch: Switch,
        workers: Collection[Worker],
        limits: Limits,
        fail: Callable[[Session, BaseException], None],
    ) -> None:
        self._switch = switch
        self._workers = workers
        self._limits = limits
        self._fail = fail

    def look(self) -> float:
        """Deal with what is late; when to look again, unless a session comes or goes before. Loop's clock, seconds."""
        now = anyio.current_time()
        for worker in self._workers:
            if worker.oldest_call() + self._limits.call_s <= now:
                worker.abandon()
        for session in self._live():
            if session.request.deadline <= now:
                self._fail(session, DeadlineExceeded("the session did not end before its deadline"))
            elif self._stalls_at(session) <= now:
                self._fail(session, Stalled(f"nothing happened for {self._limits.stall_s:g} s: {session}"))
        instants = [min(session.request.deadline, self._stalls_at(session)) for session in self._live()]
        if self._switch.live:  # calls belong to sessions; one that begins later cannot be late earlier
            instants.append(min(now, *(worker.oldest_call() for worker in self._workers)) + self._limits.call_s)
        return max(min(instants, default=float("inf")), now + 1e-3)

    def _live(self) -> list[Session]:
        return [session for session in self._switch.live.values() if not session.final]

    def _stalls_at(self, session: Session) -> float:
        """When the session counts as stalled if nothing happens until then.

        One that waits for its reader does not stall (that is its deadline's business), and one that waits for a stage
        only if no stage gets on and no call is running (that one has `call_s`).
        """
        limit = self._limits.stall_s
        if session.home and not session.blocked_by_reader:
            return session.progress + limit
        if session.blocked_by_reader or any(worker.oldest_call() < float("inf") for worker in self._workers):
            return anyio.current_time() + limit
        return max(session.progress, self._switch.progress) + limit
