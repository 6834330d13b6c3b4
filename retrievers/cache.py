"""The documents that a session has met, ranked for a guess as the index would rank them."""

import threading
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Ids, Query, Ranking, Retriever, bound_of
from .ranking import rank

_Places = NDArray[np.intp]
_REMEMBERED = 8  # searches; queries drift, so older ones would hardly ever prove anything


class SessionCache:
    """At most `capacity` documents of one session, each with its id and the row that `retriever.score` needs.

    Texts are not held. Scores come from the retriever and the order from `rank`, so when an exact index's first
    document is here, it is the guess. When full, the document that was inserted or guessed longest ago goes: that can
    cost a right guess or a proof, and so can the order in which threads come by: any thread may use it. An output is
    never at stake: a search proves something only while all that it found is here.

    Nothing here loops over documents: a workload that retrieves at every token inserts thousands of them each time.
    """

    def __init__(self, retriever: Retriever, capacity: int = 4096) -> None:
        if capacity < 1:
            raise ValueError(f"a session's cache holds at least 1 document, not {capacity}")
        self._retriever = retriever
        self._lock = threading.Lock()
        self.capacity = capacity
        # Slots 0 to len(self) - 1 are in use and stand together, so that scoring gets a view and copies nothing.
        self._ids: Ids = np.empty(0, dtype=np.int64)
        self._used: NDArray[np.int64] = np.empty(0, dtype=np.int64)  # when last, by the clock
        self._rows: NDArray[Any] | None = None
        self._by_id: _Places = np.empty(0, dtype=np.intp)  # the slots in use, by ascending id
        self._clock = 0  # ticks once per document used, so that no two were used at the same time
        # The slots that were unused longest when they were last listed, longest first, and when each was used.
        # One used since has another time now, and everything that is not listed was used later than these.
        self._idle: _Places = np.empty(0, dtype=np.intp)
        self._idle_since: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._bound = bound_of(retriever)
        self._searches: deque[tuple[Query, Ranking]] = deque(maxlen=_REMEMBERED)

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, id: int) -> bool:
        return not len(self.missing(np.array([id], dtype=np.int64)))

    def missing(self, ids: Ids) -> Ids:
        """Those of `ids` that are not here, in the order given, each once."""
        with self._lock:
            absent = ids[self._slots(ids) < 0]
        return absent[np.sort(_firsts(absent))]

    def insert(self, ids: Ids, rows: NDArray[Any]) -> None:
        """Takes in documents, best first, with their rows (first axis: documents).

        The best counts as the most recently used. Those already here keep their row and count as used again.
        Of more than `capacity` documents the last are left out. Where an id occurs twice, its first place counts.
        """
        if len(ids) != len(rows):
            raise ValueError(f"{len(ids)} ids came with {len(rows)} rows")
        ids = ids[: self.capacity]
        with self._lock:
            slots, times = self._slots(ids), self._tick(len(ids))
            known = (slots >= 0).nonzero()[0][::-1]  # of two times for one slot the last written stays: the first's
            self._used[slots[known]] = times[known]
            new = (slots < 0).nonzero()[0]
            if len(new):
                new = new[_firsts(ids[new])]
                self._take_in(ids[new], rows[new], times[new])

    def best(self, query: Query, n: int = 1) -> Ranking | None:
        """The n best documents here for an encoded query, which count as used; None while the cache is empty."""
        with self._lock:
            return self._best(query, n)

    def searched(self, query: Query, found: Ranking) -> None:
        """The index was asked this, and found that: of what it left out, `certified` knows a bound from now on."""
        with self._lock:
            self._searches.append((query, found))

    def certified(self, query: Query, n: int = 1) -> tuple[Ranking | None, bool]:
        """`best`, and whether the index is certain to find just these, so that it need not be asked.

        They are, if all that one earlier search found is here, and whatever it left out scores less than the last of
        them by the retriever's own bound (`Bounding`). In one go, since what is here may change between two calls.
        """
        with self._lock:
            ranking = self._best(query, n)
            return ranking, ranking is not None and len(ranking.ids) == n and self._is_proven(query, ranking)

    def _best(self, query: Query, n: int) -> Ranking | None:
        if self._rows is None:
            return None
        size = len(self)
        ranking = rank(self._ids[:size], self._retriever.score(query, self._rows[:size]), n)
        self._used[self._slots(ranking.ids)] = self._tick(len(ranking.ids))
        return ranking

    def _is_proven(self, query: Query, ranking: Ranking) -> bool:
        if self._bound is None:
            return False
        last = float(ranking.scores[-1])
        return any(
            last > self._bound(query, past, found) and (self._slots(found.ids) >= 0).all()
            for past, found in reversed(self._searches)
        )

    def _slots(self, ids: Ids) -> _Places:
        """Where these documents lie; -1 for those that are not here."""
        held = self._ids[: len(self)]
        if not len(held):
            return np.full(len(ids), -1)
        slots = self._by_id.take(held.searchsorted(ids, sorter=self._by_id), mode="clip")
        slots[held[slots] != ids] = -1
        return slots

    def _tick(self, n: int) -> NDArray[np.int64]:
        """Times for n documents used now, best first: the best counts as used last."""
        self._clock += n
        return np.arange(self._clock, self._clock - n, -1)

    def _take_in(self, ids: Ids, rows: NDArray[Any], times: NDArray[np.int64]) -> None:
        """Documents that are not here, each once, at most `capacity` of them less those just used."""
        size, by_id = len(self), self._by_id
        grown = min(len(ids), self.capacity - size)
        slots = np.arange(size, size + grown)
        if grown < len(ids):
            gone = self._longest_unused(len(ids) - grown, before=times.min())
            stays = np.ones(size, dtype=np.bool_)
            stays[gone] = False
            by_id = by_id[stays.take(by_id)]
            slots = np.concatenate([slots, gone])
        held = self._room_for(size + grown, rows)
        held[slots], self._ids[slots], self._used[slots] = rows, ids, times
        by_id = np.concatenate([by_id, slots])
        self._by_id = by_id.take(self._ids.take(by_id).argsort(kind="stable"))  # a merge, if the ids come in order

    def _longest_unused(self, n: int, *, before: int) -> _Places:
        """The slots of the n documents unused longest, all of them last used before that time.

        Many more are listed than asked for: listing takes longer than all else in a small insertion.
        """
        idle: _Places = self._idle[self._used[self._idle] == self._idle_since]
        if len(idle) < n:
            idle = self._used[: len(self)].argsort(kind="stable")[: 16 * n]
            idle = idle[self._used[idle] < before]  # what is inserted now may come between two that are here
        self._idle, self._idle_since = idle[n:], self._used[idle[n:]]
        return idle[:n]

    def _room_for(self, size: int, like: NDArray[Any]) -> NDArray[Any]:
        """The rows, with room for `size` documents; doubles, so that a session's growth costs little."""
        rows = self._rows if self._rows is not None else np.empty((0, *like.shape[1:]), dtype=like.dtype)
        if size > len(rows):
            room = min(max(64, 2 * len(rows), size), self.capacity)
            self._ids, self._used, rows = _grown(self._ids, room), _grown(self._used, room), _grown(rows, room)
            self._rows = rows
        return rows


def _firsts(ids: Ids) -> _Places:
    """The first place of each id, by ascending id."""
    return np.unique(ids, return_index=True)[1]


def _grown(old: NDArray[Any], room: int) -> NDArray[Any]:
    new = np.empty((room, *old.shape[1:]), dtype=old.dtype)
    new[: len(old)] = old
    return new
