"""A model that tells its hidden states, and a datastore made with it, whose every answer is computed from its input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fakes import VOCABULARY, Certifying, FakeModel, FakeRetriever, draw

from ralmspec.pipeline import KnnLM
from ralmspec.retrievers.base import Document, Query, Ranking, Scores
from ralmspec.stages.model import Frontier, Tokens

WIDTH = 4


class KeyedModel(FakeModel):
    """Scores drawn from the last tokens; the hidden state counts the last three, so that many contexts share one."""

    key_dimension = WIDTH

    def fingerprint(self) -> str:
        return f"keyed {self.seed}"

    def _frontier(self, tokens: Tokens) -> Frontier:
        seen = tuple(tokens[-self.memory :].tolist())
        if seen not in self._remembered:
            logits = np.random.default_rng(draw(self.seed, seen)).normal(0, 1.5, VOCABULARY)
            self._remembered[seen] = Frontier(logits, key_of(tokens))
        return self._remembered[seen]


def key_of(tokens: Sequence[int] | Tokens) -> Scores:
    """Whole numbers, so that distances are exact and ties are frequent."""
    key = np.zeros(WIDTH, dtype=np.float32)
    for place, token in enumerate(tokens[-3:]):
        key[int(token) % WIDTH] += place + 1
    return key


class FakeDatastore:
    """Entries of a text of random tokens with repeats."""

    dimension = WIDTH

    def __init__(self, model: KeyedModel, *, entries: int = 400, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        phrases = generator.integers(0, VOCABULARY, (12, 5))
        tokens = phrases[generator.integers(0, len(phrases), entries // 5 + 1)].ravel()[: entries + 1]
        self.keys = np.stack([key_of(tokens[: end + 1]) for end in range(entries)])
        self.values = tokens[1:].astype(np.int32)
        self.fingerprint = model.fingerprint()


class Neighbours(FakeRetriever):
    """The datastore's entries by squared distance, exact, ties by id."""

    def __init__(self, datastore: FakeDatastore) -> None:
        self.vectors = datastore.keys
        self.searches: list[int] = []

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        assert all(query.vector is not None for query in queries), "a datastore is asked by states, not by text"
        return list(queries)

    def score(self, query: Query, rows: Any) -> Scores:
        scores: Scores = -((np.asarray(rows) - query.vector) ** 2).sum(axis=1, dtype=np.float32)
        return scores

    def document(self, id: int) -> Document:
        return Document(id, f"entry {id:,}", "")


class Bounded(Certifying, Neighbours):
    """Also knows how near an entry can be that a search left out."""


class Approximate(Neighbours):
    """Never finds every third entry for a query, which ones depends on the query; the cache may know better."""

    def _rank(self, query: Query, k: int) -> Ranking:
        whole = super()._rank(query, len(self))
        assert query.vector is not None
        found = whole.ids % 3 != draw(query.vector.tolist()) % 3
        return Ranking(whole.ids[found][:k], whole.scores[found][:k])


def knn_world(
    *, seed: int = 0, retriever: type[Neighbours] = Neighbours, ends: bool = False, entries: int = 400, **settings: Any
) -> tuple[KeyedModel, Neighbours, KnnLM]:
    """A model, its neighbours, and the workload."""
    model = KeyedModel(seed=seed, ends=ends)
    datastore = FakeDatastore(model, entries=entries, seed=seed)
    given = {"top_k": 8, "interpolation": 0.5, "temperature": 2.0, "successors": 3} | settings
    return model, retriever(datastore), KnnLM(datastore=datastore, **given)
