"""The KV memory of every session: a few slots each, found by the longest token prefix shared with a request."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .model import Tokens

NEW_DOCUMENT = 32
"""A shared prefix shorter than this, and than half of the slot, is chance: the request has another document."""


@dataclass(slots=True, eq=False)
class Slot:
    """Keys and values of `tokens` (int64 [n]), in a cache of transformers' `DynamicCache` kind."""

    cache: Any
    tokens: Tokens = field(default_factory=lambda: np.empty(0, dtype=np.int64))


class KvSlots:
    """Up to `per_session` slots for each session, the least recently used first.

    A slot that is being worked on is not held here: `take` removes it and `put` brings it back, so a forward pass that
    dies in between leaves nothing behind. `take` and `put` belong to the model's worker; the rest may run beside them.
    """

    def __init__(self, empty: Callable[[], Any], *, per_session: int) -> None:
        if per_session < 1:
            raise ValueError(f"slots_per_session={per_session}: a session needs at least one")
        self._empty = empty
        self._per_session = per_session
        self._held: dict[int, list[Slot]] = {}
        self._lock = threading.Lock()

    def take(self, session: int, tokens: Tokens) -> tuple[Slot, int]:
        """A slot that holds the first n of `tokens` and no more, and n < len(tokens)."""
        with self._lock:
            slots = self._held.get(session, [])
            shared = [_shared(slot.tokens, tokens) for slot in slots]
            chosen = max(range(len(slots)), key=lambda i: (shared[i], i), default=-1)
            if chosen < 0 or shared[chosen] < min(NEW_DOCUMENT, (len(slots[chosen].tokens) + 1) // 2):
                if len(slots) < self._per_session:
                    return Slot(self._empty()), 0
                chosen = 0
            slot = slots.pop(chosen)
        keep = min(shared[chosen], len(tokens) - 1)  # the last token's logits are wanted, so it is always forwarded
        if keep == 0:
            return Slot(self._empty()), 0
        if surplus := len(slot.tokens) - keep:
            slot.cache.crop(-surplus)  # negative: the number of tokens to remove, the only form transformers 5 takes
        return slot, keep

    def put(self, session: int, slot: Slot, tokens: Tokens) -> None:
        """Hold a slot whose cache now covers `tokens`, as the most recently used one."""
        slot.tokens = tokens
        with self._lock:
            self._held.setdefault(session, []).append(slot)

    def forget(self, session: int) -> None:
        """Free what the session holds."""
        with self._lock:
            self._held.pop(session, None)

    def sessions(self) -> int:
        """How many sessions hold a slot."""
        with self._lock:
            return sum(bool(slots) for slots in self._held.values())

    def bytes(self) -> int:
        """Memory of all slots that are not being worked on, in bytes."""
        with self._lock:
            layers = [layer for slots in self._held.values() for slot in slots for layer in slot.cache.layers]
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _shared(held: Tokens, wanted: Tokens) -> int:
    n = min(len(held), len(wanted))
    different = held[:n] != wanted[:n]
    first = int(different.argmax()) if n else 0
    return first if n and different[first] else n
