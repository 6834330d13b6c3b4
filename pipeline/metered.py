"""A model and a retriever that note what is asked of them; all else passes through."""

import threading
import time
from collections.abc import Sequence
from typing import Any

from ralmspec.retrievers.base import Query, Ranking
from ralmspec.stages.model import Frontier, Prefix


class StandIn:
    """Stands for a model or a retriever: what it does not do itself, the one inside does."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)


class MeteredModel(StandIn):
    """Counts forward passes, the prefixes in them, those answered with a frontier, and seconds inside."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.passes = 0
        self.prefixes = 0
        self.frontiers = 0
        self.forward_s = 0.0

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        """As the model does it, in its one thread."""
        self.passes += 1
        self.prefixes += len(prefixes)
        begun = time.perf_counter()
        try:
            outcomes: list[Frontier | Exception | None] = self._inner.forward(prefixes)
        finally:
            self.forward_s += time.perf_counter() - begun
        self.frontiers += sum(isinstance(outcome, Frontier) for outcome in outcomes)
        return outcomes

    @property
    def mean_batch(self) -> float | None:
        """Sessions a forward pass; None before the first."""
        return self.prefixes / self.passes if self.passes else None


class MeteredRetriever(StandIn):
    """Counts searches and the queries in them, in however many threads."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.calls = 0
        self.queries = 0
        self._counting = threading.Lock()

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """As the retriever does it."""
        with self._counting:
            self.calls += 1
            self.queries += len(queries)
        rankings: list[Ranking] = self._inner.search(queries, k)
        return rankings
