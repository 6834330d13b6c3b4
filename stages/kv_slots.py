"""The KV memory of every session: a few slots each, found by the longest token prefix shared with a request."""

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .model import Tokens

NEW_DOCUMENT = 32
"""A shared prefix shorter than this, and than half of the slot, is chance: the request has another document."""

BLOCK = 64
"""Slots grow by so many tokens at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """What one token takes: for each of `layers`, a key and a value of `dimension` numbers for each of `heads`."""

    layers: int
    heads: int
    dimension: int
    dtype: Any
    device: Any

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.layers * self.heads * self.dimension * int(self.dtype.itemsize)

    def allocate(self, capacity: int) -> Any:
        """Room for so many tokens: [layers, 2, heads, capacity, dimension]; its numbers are not set."""
        import torch

        shape = (self.layers, 2, self.heads, capacity, self.dimension)
        return torch.empty(shape, dtype=self.dtype, device=self.device)


@dataclass(slots=True, eq=False)
class Slot:
    """Keys and values of `tokens` (int64 [n]), the first n of each row of `memory`; what lies behind is of no account.

    So going back to an earlier prefix is a shorter `tokens`, and costs nothing.
    """

    memory: Any
    tokens: Tokens = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    used: int = 0

    @property
    def capacity(self) -> int:
        """How many tokens there is room for."""
        return int(self.memory.shape[3])


class KvSlots:
    """Up to `per_session` slots for each session, and never more than `budget` bytes in all.

    A slot that is being worked on is not held here: `take` removes it and `put` brings it back; one that is not brought
    back must be `drop`ped. Where the budget is used up, slots that a session does not need for its next token go first,
    the least recently used one before others. `take`, `grow`, `put` and `drop` belong to the model's worker; the rest
    may run beside them.
    """

    def __init__(self, layout: KvLayout, *, per_session: int, longest: int, budget: int) -> None:
        if per_session < 1:
            raise ValueError(f"slots_per_session={per_session}: a session needs at least one")
        if budget < longest * layout.token_bytes:
            raise ValueError(
                f"kv_bytes={budget}: one prefix of {longest} tokens takes {longest * layout.token_bytes} bytes "
                "in this model; allow that at least"
            )
        self.budget = budget
        self.layout = layout
        self._longest = longest
        self._per_session = per_session
        self._held: dict[int, list[Slot]] = {}  # the newest of a session last
        self._lock = threading.Lock()
        self._bytes = 0
        self._uses = 0

    def take(self, session: int, tokens: Tokens, proposed: int = 0) -> Slot:
        """A slot that holds the first tokens of `tokens`, as many as are known, but at most n - 1 - `proposed`."""
        with self._lock:
            slots = self._held.get(session, [])
            shared = [_shared(slot.tokens, tokens) for slot in slots]
            chosen = max(range(len(slots)), key=lambda i: (shared[i], i), default=-1)
            if chosen < 0 or shared[chosen] < min(NEW_DOCUMENT, (len(slots[chosen].tokens) + 1) // 2):
                if len(slots) < self._per_session:
                    return Slot(self.layout.allocate(0))
                chosen = 0
            slot = slots.pop(chosen)
        # What comes after the last tokens is wanted, so they are always forwarded.
        slot.tokens = tokens[: min(shared[chosen], len(tokens) - 1 - proposed)]
        return slot

    def grow(self, slot: Slot, length: int) -> None:
        """Make room in a slot that was taken for so many tokens."""
        if length <= slot.capacity:
            return
        capacity, n = min(-(-length // BLOCK) * BLOCK, self._longest), len(slot.tokens)
        with self._lock:
            self._evict((capacity - slot.capacity) * self.layout.token_bytes)
        memory = self.layout.allocate(capacity)
        memory[:, :, :, :n] = slot.memory[:, :, :, :n]
        with self._lock:
            self._bytes += (capacity - slot.capacity) * self.layout.token_bytes
        slot.memory = memory

    def put(self, session: int, slot: Slot, tokens: Tokens) -> None:
        """Hold a slot that now covers `tokens`, as the most recently used one."""
        slot.tokens = tokens
        with self._lock:
            self._uses += 1
            slot.used = self._uses
            if slot.capacity:
                self._held.setdefault(session, []).append(slot)

    def drop(self, slot: Slot) -> None:
        """A slot that was taken will not come back."""
        with self._lock:
            self._free(slot)

    def forget(self, session: int) -> None:
        """Free what the session holds."""
        with self._lock:
            for slot in self._held.pop(session, []):
                self._free(slot)

    def sessions(self) -> int:
        """How many sessions hold a slot."""
        with self._lock:
            return sum(bool(slots) for slots in self._held.values())

    def bytes(self) -> int:
        """Memory of all slots, those that are being worked on included, in bytes."""
        return self._bytes

    def _evict(self, more: int) -> None:
        """Free held slots until so many bytes more are within the budget, if they can be."""
        while self._bytes + more > self.budget:
            held = [(session, n) for session, slots in self._held.items() for n in range(len(slots))]
            if not held:
                return

            def worth(place: tuple[int, int]) -> tuple[bool, int]:
                session, n = place
                return n == len(self._held[session]) - 1, self._held[session][n].used

            session, n = min(held, key=worth)
            self._free(self._held[session].pop(n))

    def _free(self, slot: Slot) -> None:
        self._bytes -= slot.capacity * self.layout.token_bytes


def _shared(held: Tokens, wanted: Tokens) -> int:
    n = min(len(held), len(wanted))
    different = held[:n] != wanted[:n]
    first = int(different.argmax()) if n else 0
    return first if n and different[first] else n
