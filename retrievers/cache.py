"""The documents that a session has met, ranked for a guess as the index would rank them."""

from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Ids, Query, Ranking, Retriever
from .ranking import rank


class SessionCache:
    """At most `capacity` documents of one session, each with its id and the row that `retriever.score` needs.

    Texts are not held. Scores come from the retriever and the order from `rank`, so when an exact index's first
    document is here, it is the guess. When full, the document that was inserted or guessed longest ago goes: that can
    cost a right guess, never a right output. Not thread-safe: it belongs to its session, on the event loop.
    """

    def __init__(self, retriever: Retriever, capacity: int = 4096) -> None:
        if capacity < 1:
            raise ValueError(f"a session's cache holds at least 1 document, not {capacity}")
        self._retriever = retriever
        self._capacity = capacity
        self._slots: OrderedDict[int, int] = OrderedDict()  # id -> slot, longest unused first
        # Slots 0 to len(self) - 1 are in use and stand together, so that scoring gets a view and copies nothing.
        self._ids: Ids = np.empty(0, dtype=np.int64)
        self._rows: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, id: int) -> bool:
        return id in self._slots

    def insert(self, ids: Ids, rows: NDArray[Any]) -> None:
        """Takes in documents, best first, with their rows (first axis: documents).

        The best counts as the most recently used. Those already here keep their row and count as used again.
        Of more than `capacity` documents the last are left out.
        """
        if len(ids) != len(rows):
            raise ValueError(f"{len(ids)} ids came with {len(rows)} rows")
        slots, sources = [], []
        for source in reversed(range(min(len(ids), self._capacity))):
            id = int(ids[source])
            if id in self._slots:
                self._slots.move_to_end(id)
            else:
                self._slots[id] = self._free_slot()
                slots.append(self._slots[id])
                sources.append(source)
        if slots:
            held = self._room_for_slots(rows)
            self._ids[slots] = ids[sources]
            held[slots] = rows[sources]

    def best(self, query: Query, n: int = 1) -> Ranking | None:
        """The n best documents here for an encoded query, which count as used; None while the cache is empty."""
        if self._rows is None:
            return None
        size = len(self._slots)
        ranking = rank(self._ids[:size], self._retriever.score(query, self._rows[:size]), n)
        for id in reversed(ranking.ids.tolist()):
            self._slots.move_to_end(id)
        return ranking

    def _free_slot(self) -> int:
        if len(self._slots) == self._capacity:
            return self._slots.popitem(last=False)[1]
        return len(self._slots)

    def _room_for_slots(self, like: NDArray[Any]) -> NDArray[Any]:
        """The rows, with room for every slot in use; doubles, so that a session's growth costs little."""
        old = self._rows if self._rows is not None else np.empty((0, *like.shape[1:]), dtype=like.dtype)
        if len(self._slots) > len(old):
            room = min(max(64, 2 * len(old), len(self._slots)), self._capacity)
            ids, rows = np.empty(room, dtype=np.int64), np.empty((room, *old.shape[1:]), dtype=old.dtype)
            ids[: len(old)], rows[: len(old)] = self._ids, old
            self._ids, self._rows = ids, rows
            return rows
        return old
