"""A retriever that answers in a set time, as if its index had resources of its own."""

import math
import threading
import time
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from .base import Document, Ids, Query, Ranking, Retriever, Scores, bound_of


class SetLatency:
    """Makes every search call of `retriever` take `seconds`, with at most `concurrency` calls at once.

    This is a simulation, and every report that uses it must say so (`description` does): the real search runs here,
    on this machine's cores, inside the set time; the rest is slept. So a caller sees the waiting of an index on another
    machine, and the true results. Calls wait inside their set time for an inner retriever that takes fewer at once.
    A call whose real search takes longer than `seconds` is late and counted in `overruns`: a report with overruns did
    not measure what it claims. Everything but `search` passes through unchanged and undelayed.
    """

    def __init__(self, retriever: Retriever, seconds: float, concurrency: int = 1) -> None:
        if not seconds >= 0:
            raise ValueError(f"a latency is 0 seconds or more, not {seconds}")
        if concurrency < 1:
            raise ValueError(f"a retriever takes at least 1 search at a time, not {concurrency}")
        self.seconds = seconds
        self.concurrency = concurrency
        self.overruns = 0
        self._retriever = retriever
        self._inner_searches = threading.BoundedSemaphore(retriever.concurrency)
        self._counting = threading.Lock()

    @property
    def description(self) -> str:
        """What a report calls this retriever."""
        return f"{self._retriever.description}; simulated latency {self.seconds:g} s a call, {self.concurrency} at once"

    def __len__(self) -> int:
        return len(self._retriever)

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        """As the inner retriever does it."""
        return self._retriever.encode(queries)

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The inner retriever's answer, `seconds` after the call."""
        called = time.monotonic()
        with self._inner_searches:
            rankings = self._retriever.search(queries, k)
        left = self.seconds - (time.monotonic() - called)
        if left > 0:
            time.sleep(left)
        elif left < 0:
            with self._counting:
                self.overruns += 1
        return rankings

    def rows(self, ids: Ids) -> NDArray[Any]:
        """As the inner retriever does it."""
        return self._retriever.rows(ids)

    def score(self, query: Query, rows: NDArray[Any]) -> Scores:
        """As the inner retriever does it."""
        return self._retriever.score(query, rows)

    def bound(self, query: Query, past: Query, found: Ranking) -> float:
        """As the inner retriever does it, if it does."""
        bound = bound_of(self._retriever)
        return math.inf if bound is None else bound(query, past, found)

    def document(self, id: int) -> Document:
        """As the inner retriever does it."""
        return self._retriever.document(id)
