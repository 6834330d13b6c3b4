"""Who is let in, and when: slots, KV memory, and the waiting room in front of them."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import anyio

from ralmspec.stages.request import Request
from ralmspec.stages.session import Session
from ralmspec.stages.sink import Sink

from .errors import DeadlineExceeded, Overloaded
from .limits import Limits

FIRST_HINT_S = 1.0
"""When to come back, as long as no slot has been freed that could tell."""
SHORTEST_HINT_S = 0.01


@dataclass(slots=True, eq=False)
class _Place:
    """A place in the waiting room; `need` in tokens of KV memory."""

    need: int
    called: anyio.Event = field(default_factory=anyio.Event)


class Admission:
    """Lets requests in, in the order in which they came.

    Two bounds hold for what is live: `Limits.sessions` slots, and `kv_tokens` tokens of KV memory, of which a session
    takes all that it may ever need, `room` tokens and its new ones, until its slot is free (R6). Who does not fit waits
    in front, in a room of `Limits.waiting` places, and is let in only if its turn is expected within its deadline and
    within `Limits.patience_s`; nobody overtakes, so a large request is not starved by small ones.
    What is held is counted from the `live` sessions each time, so nothing can be forgotten when it is given back.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        kv_tokens: int,
        room: int,
        live: Mapping[int, Session],
        refuse_if_closed: Callable[[], None],
    ) -> None:
        self._limits = limits
        self._kv_tokens = kv_tokens
        self._room = room
        self._live = live
        self._refuse_if_closed = refuse_if_closed
        self._places: deque[_Place] = deque()
        self._held_s: float | None = None  # how long a slot is held, a moving average

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._places)

    async def let_in(self, request: Request, begin: Callable[[], Sink]) -> Sink:
        """`begin` the request's session when its turn has come; that it fits, and that it begins, is one section (R1).

        Raises `Overloaded` where waiting would be in vain, `DeadlineExceeded` where the deadline passes first, and what
        `refuse_if_closed` raises. Whatever cuts the wait leaves nothing behind.
        """
        self.refuse_if_hopeless(request.max_new_tokens, request.deadline)
        place = _Place(self._room + request.max_new_tokens)
        self._places.append(place)
        try:
            self._call_first()
            if not place.called.is_set():
                with anyio.CancelScope(deadline=request.deadline):
                    await place.called.wait()
            self._refuse_if_closed()
            if anyio.current_time() >= request.deadline:  # work past its deadline is never begun
                raise DeadlineExceeded("the deadline passed before the session could begin")
            return begin()
        finally:
            self._places.remove(place)
            self._call_first()

    def refuse_if_hopeless(self, max_new_tokens: int, deadline: float) -> None:
        """Raise `Overloaded` if this request could begin neither now nor in time, or what says that all is closed."""
        self._refuse_if_closed()
        need = self._room + max_new_tokens
        if not self._places and self._fits(need):
            return
        why, remedy = self._bound(need)
        wait_s = self._expected_wait_s(need)
        hint_s = FIRST_HINT_S if wait_s is None else max(wait_s, SHORTEST_HINT_S)
        again = f"try again in about {hint_s:.2g} s, or {remedy}"
        if len(self._places) >= self._limits.waiting:
            full = f"and the waiting room is full ({len(self._places)} of {self._limits.waiting} places)"
            raise Overloaded(f"{why}, {full}: {again}", retry_after_s=hint_s)
        if wait_s is None:
            return
        turn = f"and the turn of this request would come in about {wait_s:.2g} s"
        if anyio.current_time() + wait_s > deadline:
            raise Overloaded(f"{why}, {turn}, after its deadline: {again}", retry_after_s=hint_s)
        if wait_s > self._limits.patience_s:
            over = f"over Limits(patience_s={self._limits.patience_s:g})"
            raise Overloaded(f"{why}, {turn}, {over}: {again}", retry_after_s=hint_s)

    def released(self, session: Session) -> None:
        """A session is no longer live: what it held is free, and whoever is first may fit now."""
        held_s = anyio.current_time() - session.admitted
        self._held_s = held_s if self._held_s is None else self._held_s + 0.1 * (held_s - self._held_s)
        self._call_first()

    def close(self) -> None:
        """Nobody is let in any more: all who wait leave now, with what `refuse_if_closed` raises."""
        for place in self._places:
            place.called.set()

    def _call_first(self) -> None:
        """Whoever is called finds its room free: nobody else may take anything before the first one has."""
        if self._places and self._fits(self._places[0].need):
            self._places[0].called.set()

    def _fits(self, need: int) -> bool:
        return len(self._live) < self._limits.sessions and self._held + need <= self._kv_tokens

    @property
    def _held(self) -> int:
        """Tokens of KV memory that live sessions may come to need."""
        return sum(self._room + session.request.max_new_tokens for session in self._live.values())

    def _expected_wait_s(self, need: int) -> float | None:
        """How long the turn of one more request would take to come; None before any slot was freed.

        A slot has lately been held for so long on average: in that time, as much comes free as is held now.
        """
        if self._held_s is None:
            return None
        slots = len(self._live) + len(self._places) + 1 - self._limits.sessions
        tokens = self._held + sum(place.need for place in self._places) + need - self._kv_tokens
        share = max(slots / max(len(self._live), 1), tokens / max(self._held, 1), 0.0)
        return self._held_s * share

    def _bound(self, need: int) -> tuple[str, str]:
        """Which bound is in the way, and what to do about it."""
        if len(self._live) >= self._limits.sessions:
            return f"all {self._limits.sessions} slots are taken", "raise Limits(sessions=...)"
        if self._held + need > self._kv_tokens:
            free = f"{self._kv_tokens - self._held} of {self._kv_tokens} tokens are free"
            why = f"there is no KV memory left for the {need} tokens that this request may need ({free})"
            return why, "give the model more KV memory, or lower max_new_tokens"
        return "others wait for their turn", "raise Limits(sessions=...)"
