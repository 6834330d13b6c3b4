"""A model, a knowledge base and workers whose every answer and every delay is known, for tests of the pipeline."""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, TypeVarTuple

import anyio
import numpy as np

from ralmspec.retrievers.base import Document, Ids, Query, Ranking, Scores
from ralmspec.stages.errors import WorkerLost
from ralmspec.stages.model import Frontier, Prefix, Tokens, token_by_token

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

VOCABULARY = 24
END = 0


def draw(*values: object) -> int:
    """A number that depends on the values and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")


class FakeModel:
    """Next token: a fixed draw from the document's first token and the last `memory` tokens.

    Text is numbers with spaces between them. `stubborn` is the share of positions at which the document does not
    matter, so that a wrong guess may still give the right token. `halts` is the share of prefixes of which a pass reads
    only a part.
    """

    context_length = 4096
    max_batch = 1
    kv_tokens = 1 << 30
    start_tokens: tuple[int, ...] = ()

    def __init__(
        self, *, memory: int = 3, stubborn: float = 0.5, ends: bool = True, seed: int = 0, halts: float = 0.0
    ) -> None:
        self.end_tokens = frozenset({END}) if ends else frozenset()
        self.memory = memory
        self.stubborn = stubborn
        self.seed = seed
        self.halts = halts
        self.passes = 0
        self.forgotten: list[int] = []
        self._remembered: dict[tuple[int, ...], Frontier] = {}

    def encode(self, text: str) -> list[int]:
        return [int(word) % VOCABULARY for word in text.split() if word.isdigit()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(str(token) for token in tokens)

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        self.passes += 1
        return [token_by_token(prefix, self._frontier) if self._reads(prefix) else None for prefix in prefixes]

    def _reads(self, prefix: Prefix) -> bool:
        return not self.halts or draw(self.seed, self.passes, len(prefix.tokens)) % 1000 >= 1000 * self.halts

    def _frontier(self, tokens: Tokens) -> Frontier:
        seen = (int(tokens[0]), *tokens[-self.memory :].tolist())
        if seen not in self._remembered:
            self._remembered[seen] = Frontier(self.logits(tokens.tolist()))
        return self._remembered[seen]

    def logits(self, tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        recent = tuple(tokens[-self.memory :])
        document = tokens[0] if draw(self.seed, recent) % 1000 >= 1000 * self.stubborn else -1
        logits = np.zeros(VOCABULARY)
        logits[draw(self.seed, recent, document, "token") % VOCABULARY] = 1.0
        return logits

    def forget(self, session: int) -> None:
        self.forgotten.append(session)


class FakeRetriever:
    """Whole-number vectors, so that scores are exact and ties are frequent; ties by id, as promised.

    A query's vector counts its last tokens; `drift` of them change from step to step, so documents repeat.
    """

    concurrency: int = 1
    description = "fake"

    def __init__(self, *, documents: int = 12, dimension: int = 6, seed: int = 0, spread: int = 3) -> None:
        generator = np.random.default_rng(seed)
        self.vectors = generator.integers(0, spread, (documents, dimension)).astype(np.float32)
        self.searches: list[int] = []

    def __len__(self) -> int:
        return len(self.vectors)

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        return [Query(text=query.text, vector=self._vector(query.text)) for query in queries]

    def _vector(self, text: str) -> Scores:
        vector = np.zeros(self.vectors.shape[1], dtype=np.float32)
        for word in text.split():
            vector[int(word) % len(vector)] += 1
        return vector

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        self.searches.append(len(queries))
        return [self._rank(query, k) for query in queries]

    def _rank(self, query: Query, k: int) -> Ranking:
        scores = self.score(query, self.vectors)
        order = np.lexsort((np.arange(len(scores)), -scores))[:k]
        return Ranking(order.astype(np.int64), scores[order])

    def rows(self, ids: Ids) -> Scores:
        return self.vectors[ids]

    def score(self, query: Query, rows: Any) -> Scores:
        assert query.vector is not None, "a query is encoded before it is scored"
        return np.asarray(rows @ query.vector, dtype=np.float32)

    def document(self, id: int) -> Document:
        return Document(id, f"document {id}", f"{id % VOCABULARY} {id // VOCABULARY} 7")


class Certifying(FakeRetriever):
    """Knows what a search has left out, and how high that scores for another query: no bound could be closer."""

    def bound(self, query: Query, past: Query, found: Ranking) -> float:
        left = np.setdiff1d(np.arange(len(self)), found.ids)
        return float(self.score(query, self.vectors[left]).max(initial=-np.inf))


class AlwaysMisses(FakeRetriever):
    """Every query has a document of its own that no earlier query had, as long as they last."""

    def __init__(self, documents: int = 4096) -> None:
        super().__init__(documents=documents)
        self._own: dict[str, int] = {}

    def _rank(self, query: Query, k: int) -> Ranking:
        own = self._own.setdefault(query.text, len(self._own))
        others = [id for id in range(len(self)) if id != own][: k - 1]
        ids = np.array([own, *others], dtype=np.int64)
        return Ranking(ids, np.arange(len(ids), 0, -1).astype(np.float32))

    def score(self, query: Query, rows: Any) -> Scores:
        return np.zeros(len(rows), dtype=np.float32)


class Scattered(FakeRetriever):
    """A query's document is drawn from its text alone, and the cache's guess has nothing to do with it."""

    def _rank(self, query: Query, k: int) -> Ranking:
        own = draw(query.text) % len(self)
        ids = np.array([own, *(id for id in range(min(k, len(self))) if id != own)][:k], dtype=np.int64)
        return Ranking(ids, np.arange(len(ids), 0, -1).astype(np.float32))

    def score(self, query: Query, rows: Any) -> Scores:
        return np.zeros(len(rows), dtype=np.float32)


class Guessing:
    """A drafter: brings the retriever's own documents for some queries, and others for the rest."""

    def __init__(self, retriever: Any, right: float = 0.5) -> None:
        self._retriever = retriever
        self._right = right
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self._retriever)

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        self.asked.append(len(queries))
        return [self._rank(query, k) for query in queries]

    def _rank(self, query: Query, k: int) -> Ranking:
        (truth,) = self._retriever.search([query], k)
        told = query.text, None if query.vector is None else query.vector.tobytes()
        if draw(told) % 1000 < 1000 * self._right:
            return Ranking(truth.ids, truth.scores)
        return Ranking((truth.ids + 1 + draw(told, "other") % len(self)) % len(self), truth.scores)


class VirtualWorker:
    """The worker seam without threads: the work is done at once, its delay is slept on the test's own clock.

    Like a thread call it cannot be cancelled. `delay(name)` gives seconds (for ever, if infinite), `fault(name)` may
    raise.
    """

    def __init__(
        self, name: str, delay: Callable[[str], float], fault: Callable[[str], None] = lambda name: None
    ) -> None:
        self.name = name
        self.delay = delay
        self.fault = fault
        self.running = 0
        self.log: list[tuple[float, float]] = []
        self._begun: list[float] = []
        self._abandoned = anyio.Event()

    async def call(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        start = anyio.current_time()
        self.running += 1
        self._begun.append(start)
        try:
            with anyio.CancelScope(shield=True):
                if math.isinf(seconds := self.delay(self.name)):
                    await self._abandoned.wait()
                    raise WorkerLost(f"the call to {self.name} was given up")
                await anyio.sleep(seconds)
            self.fault(self.name)
            return work(*arguments)
        finally:
            self.running -= 1
            self._begun.remove(start)
            self.log.append((start, anyio.current_time()))

    def oldest_call(self) -> float:
        return min(self._begun, default=math.inf)

    def abandon(self) -> None:
        self._abandoned.set()

    def close(self, timeout_s: float) -> bool:
        return True


class Workers:
    """Makes the workers of one pipeline and keeps them at hand; `seconds` of each name may change meanwhile."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.made: dict[str, VirtualWorker] = {}

    def __call__(self, name: str, threads: int) -> VirtualWorker:
        self.made[name] = VirtualWorker(name, lambda name: self.seconds.get(name, 0.0))
        return self.made[name]

    def __getitem__(self, name: str) -> VirtualWorker:
        return self.made[name]


def fixed(**seconds: float) -> Callable[[str, int], VirtualWorker]:
    """Workers with a constant delay for each name, none for names not given."""
    return lambda name, threads: VirtualWorker(name, lambda name: seconds.get(name, 0.0))


def jittered(seed: int, mean_s: float = 0.01) -> Callable[[str, int], VirtualWorker]:
    """Workers with seeded random delays."""
    generator = random.Random(seed)
    return lambda name, threads: VirtualWorker(name, lambda name: generator.expovariate(1 / mean_s))
