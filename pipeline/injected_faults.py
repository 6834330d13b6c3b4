"""Faults made on purpose: calls into model and retriever that go wrong, and a stage that dies."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar, TypeVarTuple

import numpy as np

from ralmspec.retrievers.base import Ids, Query, Ranking, Scores
from ralmspec.stages.errors import ModelFailed, WorkerLost
from ralmspec.stages.model import Frontier, Prefix

from .metered import StandIn
from .threads import ThreadWorker

LATE_S = 0.1
"""How much later a late answer comes."""

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class Injected(Exception):
    """A fault made on purpose."""


class Faults:
    """Which calls go wrong, and how: each with probability `rate`, each kind equally often. Used from many threads.

    `made` counts them, by call and kind.
    """

    def __init__(self, rate: float, seed: int) -> None:
        self.made: Counter[str] = Counter()
        self._rate = rate
        self._chance = random.Random(f"{seed} faults")
        self._drawing = threading.Lock()

    def draw(self, call: str, *kinds: str, share: float = 1.0) -> str:
        """The kind of fault for this call, mostly none: ''. `raises` and `late` have happened when this returns.

        A call that is made for every session of a batch has a smaller `share` of the rate than one made for all.
        """
        if not self._rate:
            return ""
        with self._drawing:
            if self._chance.random() >= self._rate * share:
                return ""
            kind = self._chance.choice(("raises", "late", *kinds))
            self.made[f"{call} {kind}"] += 1
        if kind == "raises":
            raise Injected(f"{call} raised on purpose")
        if kind == "late":
            time.sleep(LATE_S)
        return kind


class FaultyModel(StandIn):
    """A pass may raise, come late, bring a frontier too few, or for one session NaN, the wrong shape, or a failure."""

    def __init__(self, inner: object, faults: Faults) -> None:
        super().__init__(inner)
        self._faults = faults

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        """A pass that may go wrong."""
        kind = self._faults.draw("forward", "short", "nan", "shape", "fails one")
        outcomes: list[Frontier | Exception | None] = self._inner.forward(prefixes)
        match kind, outcomes:
            case "short", _:
                return outcomes[:-1]
            case "nan", [Frontier() as first, *others]:
                return [replace(first, logits=np.full_like(first.logits, np.nan)), *others]
            case "shape", [Frontier() as first, *others]:
                return [replace(first, logits=first.logits[None]), *others]
            case "fails one", [_, *others]:
                return [ModelFailed("one session's pass failed on purpose"), *others]
        return outcomes


class FaultyRetriever(StandIn):
    """`encode`, `search` and `rows` may raise, come late, or bring something that is not what was asked for."""

    def __init__(self, inner: object, faults: Faults) -> None:
        super().__init__(inner)
        self._faults = faults

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        """Queries, or one too few."""
        kind = self._faults.draw("encode", "short")
        encoded: list[Query] = self._inner.encode(queries)
        return encoded[:-1] if kind == "short" else encoded

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """Rankings; or one too few, one with a score too few, with NaN, or in the wrong order."""
        kind = self._faults.draw("search", "short", "shape", "nan", "order")
        rankings: list[Ranking] = self._inner.search(queries, k)
        first, *others = rankings
        match kind:
            case "short":
                return others
            case "shape":
                return [Ranking(first.ids, first.scores[:-1]), *others]
            case "nan":
                return [Ranking(first.ids, np.full_like(first.scores, np.nan)), *others]
            case "order" if len(first.ids) > 1:
                return [Ranking(first.ids[::-1], first.scores[::-1]), *others]
        return rankings

    def rows(self, ids: Ids) -> Scores:
        """Rows, or one too few."""
        kind = self._faults.draw("rows", "short", share=0.1)
        rows: Scores = self._inner.rows(ids)
        return rows[:-1] if kind == "short" else rows


class MortalWorker(ThreadWorker):
    """A worker whose thread can be lost on purpose: the next call is the death of its stage."""

    def __init__(self, name: str, threads: int = 1) -> None:
        super().__init__(name, threads)
        self.killed = False

    async def call(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """As a thread worker does it, until it is killed."""
        if self.killed:
            raise WorkerLost(f"the {self.name} thread was killed on purpose")
        return await super().call(work, *arguments)
