"""Vectors that lie in bundles, for tests of approximate retrieval: equal and nearly equal scores abound."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ralmspec.retrievers.base import Document, Query, Ranking
from ralmspec.retrievers.vectors import Kind, Metric, Vectors, narrow

KINDS: list[Kind] = ["float32", "float16", "bfloat16"]
METRICS: list[Metric] = ["inner product", "squared L2"]


def documents(n: int) -> list[Document]:
    return [Document(i, f"title {i}", f"text {i}") for i in range(n)]


def encoder(dimension: int) -> Any:
    return SimpleNamespace(dimension=dimension)


def some(n: int = 1200, dimension: int = 16) -> NDArray[np.float32]:
    """Bundles with runs of duplicates."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((n // 20, dimension)).repeat(20, axis=0)
    vectors += 0.3 * random.standard_normal(vectors.shape)
    vectors[::5] = vectors[1::5]
    return vectors.astype(np.float32)


def stored(kind: Kind, metric: Metric = "inner product") -> Any:
    """Those vectors as an array of the kind, or for another metric than an array's as open vectors."""
    array = narrow(some(), kind)
    return array if metric == "inner product" else Vectors.open(array, metric=metric)


def served(vectors: Any) -> tuple[list[Document], Any]:
    """What a retriever needs beside vectors, an array or open ones: as many documents, and an encoder as wide."""
    dimension = vectors.dimension if isinstance(vectors, Vectors) else vectors.shape[1]
    return documents(len(vectors)), encoder(dimension)


def queries(n: int, dimension: int = 16, seed: int = 1) -> list[Query]:
    vectors = np.random.default_rng(seed).standard_normal((n, dimension), dtype=np.float32)
    return [Query(text="q", vector=vector) for vector in vectors]


def same(one: Ranking, other: Ranking) -> bool:
    return np.array_equal(one.ids, other.ids) and one.scores.tobytes() == other.scores.tobytes()
