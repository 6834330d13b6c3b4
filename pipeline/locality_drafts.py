"""Approximate indexes beside the one that is served, asked for guesses: an HNSW graph, an int8 scan, IVF lists."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ralmspec.retrievers.base import Ids, Retriever, Vector
from ralmspec.retrievers.errors import MissingExtra

KINDS = ("hnsw", "int8", "ivf")
_BLOCK = 8192


@dataclass(frozen=True, slots=True, eq=False)
class DraftIndex:
    """An index in memory over the vectors of a dense retriever, by inner product. `name` says how it is searched;
    `rounds` that its own scores are not the true ones, so that another order of what it found may be better."""

    name: str
    index: Any
    rounds: bool = False

    def search(self, vector: Vector, n: int) -> tuple[Ids, float]:
        """Ids of about the n best, best first, and the seconds it took on one thread. Blocking."""
        import faiss

        faiss.omp_set_num_threads(1)  # faiss keeps this number for each calling thread
        start = time.perf_counter()
        _, found = self.index.search(vector[np.newaxis], n)
        seconds = time.perf_counter() - start
        ids: NDArray[np.int64] = found[0]
        return ids[ids >= 0], seconds


def vectors_of(retriever: Retriever) -> Iterator[NDArray[np.float32]]:
    """All vectors of a dense retriever, block by block."""
    for start in range(0, len(retriever), _BLOCK):
        yield retriever.rows(np.arange(start, min(start + _BLOCK, len(retriever)), dtype=np.int64))


def build(kind: str, retriever: Retriever, *, threads: int = 1) -> DraftIndex:
    """One of `KINDS` over the retriever's vectors; blocking, a minute or two for 100,000 in a graph.

    hnsw: M 32, efConstruction 100, efSearch 64. int8: every number in 8 bits, all vectors scanned. ivf: about four
    times the square root of their number in lists, 16 of them scanned, vectors as float32.
    """
    try:
        import faiss
    except ImportError:
        raise MissingExtra("draft indexes need: pip install 'ralmspec[local]'") from None
    makers: dict[str, Callable[[Any, int, int], DraftIndex]] = {"hnsw": _hnsw, "int8": _int8, "ivf": _ivf}
    if kind not in makers:
        raise ValueError(f"draft indexes: {kind!r} is not one of {', '.join(KINDS)}")
    faiss.omp_set_num_threads(threads)
    vectors = np.concatenate([*vectors_of(retriever)])
    made = makers[kind](faiss, vectors.shape[1], len(vectors))
    if not made.index.is_trained:
        made.index.train(np.random.default_rng(0).permutation(vectors)[:50_000])
    made.index.add(vectors)
    return made


def _hnsw(faiss: Any, dimension: int, count: int) -> DraftIndex:
    index = faiss.IndexHNSWFlat(dimension, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 100, 64
    return DraftIndex("HNSW (M 32, efSearch 64)", index)


def _int8(faiss: Any, dimension: int, count: int) -> DraftIndex:
    coding = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexScalarQuantizer(dimension, coding, faiss.METRIC_INNER_PRODUCT)
    return DraftIndex("int8 scan", index, rounds=True)


def _ivf(faiss: Any, dimension: int, count: int) -> DraftIndex:
    lists, probes = max(1, min(round(4 * count**0.5), count // 32)), 16
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.nprobe, index.cp.min_points_per_centroid = probes, 1
    return DraftIndex(f"IVF ({lists:,} lists, {probes} probed)", index)
