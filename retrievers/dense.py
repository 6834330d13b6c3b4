"""Exact dense retrieval: every vector is compared with the query, by inner product."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Document, Query, Ranking, Vector
from .encoder import QueryEncoder
from .kernel import OneKernel, Source
from .passages import Passages
from .ranking import rank
from .vectors import Memory

_ROUNDING = 2.0**-24  # u: half the distance from 1 to the next float32
_TINY = 2.0**-126  # the smallest normal float32; below it a product or sum may lose everything
_TILE = 6 << 20  # bytes of vectors that stay in the cache while one query after the other passes over them
_SLICE = 4096  # vectors; fewer are not worth a thread's while
_PENDING = 64  # results of tiles that wait to be merged

Found = tuple[NDArray[np.float32], NDArray[np.int64]]


class ExactDense(OneKernel):
    """The k largest inner products over all vectors, exact in float32, with ties by id.

    **faiss only proposes.** It finds candidates fast, but with another kernel for large batches (BLAS) and for half
    precision, whose sums run in another order: the same pair then differs in its last bits, and two nearly equal
    documents change places with the size of the batch. So candidates are scored again by the one kernel (`OneKernel`).

    **Why no document is missed.** Let u = 2^-24 and d the dimension. In float32, summed in whatever order, fused or
    not, an inner product of q and x is off by at most e = g·|q|·|x|, g = d·u / (1 - d·u): each of the d products passes
    through at most d roundings, and the sum of the |q_i·x_i| is at most |q|·|x| (Cauchy-Schwarz); where products fall
    below the normal float32 range, 2·d·2^-126 is lost at most besides. faiss returns the `fetch` largest of its own
    scores; whatever it left out has a score of at most the smallest it returned, w. Scored again, such a document
    could gain e for faiss's error and e for ours, so it stays at or below w + 2e, e taken for the longest vector.
    If the k-th document scored again lies strictly above w + 2e, none left out can pass or even tie it. If it does
    not (long runs of equal or nearly equal vectors), that query is answered by scoring every vector with our kernel.
    Scanned in pieces, each piece gives its `fetch` largest and the `fetch` largest of all those are kept: what a piece
    left out is no larger than its smallest, hence than w, so the same holds. float16 and bfloat16 are decoded exactly.
    The bound is for float32 arithmetic. A faiss that multiplied in less would give scores farther than 2e from ours;
    a query for which one candidate's is so far off is answered by scoring every vector, too.

    `embeddings` is what `Vectors.open` takes, one vector a passage, as wide as the encoder's; `memory` says where they
    are searched. Rankings and scores are bit for bit the same. Half precision needs half the memory and is scanned
    nearly twice as fast for a few queries; from about 16 on (8, if hundreds of documents are wanted) float32 is faster.

    `threads` each scan a part of the vectors, for one query as for many; see `OneKernel`.

    `blas_threshold`: faiss turns to BLAS when queries × dimension reaches this; None for eight queries. The switch
    belongs to the whole process, and constructing this class sets it: at faiss's own 128,000 a batch of 16 is as dear
    as 16 searches. Smaller batches pass over the vectors tile by tile, so that each is fetched from memory once.
    """

    def __init__(
        self,
        passages: Passages | Sequence[Document],
        embeddings: Source,
        encoder: QueryEncoder,
        *,
        memory: Memory = "float32",
        threads: int = 1,
        blas_threshold: int | None = None,
    ) -> None:
        super().__init__(passages, embeddings, encoder, memory=memory, threads=threads)
        self._blas_threshold = 8 * self._dimension if blas_threshold is None else blas_threshold
        if hasattr(self._faiss.cvar, "distance_compute_blas_threshold"):  # not every build shows it
            self._faiss.cvar.distance_compute_blas_threshold = self._blas_threshold

    @property
    def description(self) -> str:
        """What a report calls this retriever."""
        return f"exact dense, {len(self._vectors):,} x {self._dimension} {self._vectors.kind}, faiss flat scan"

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The k best documents of each encoded query (all, if there are fewer). Blocking."""
        vectors = self._query_vectors(queries, k)
        k = min(k, len(self))
        fetch = k + max(8, k // 8)  # the spare ones put distance between the k-th and what was left out
        if fetch >= len(self._vectors) or not queries:
            return [self._scan(vector, k) for vector in vectors]
        proposed, candidates = self._propose(vectors, fetch)
        scores = self._score_ids(vectors, candidates)
        rankings = []
        for row, vector in enumerate(vectors):
            ranking, margin = rank(candidates[row], scores[row], k), 2 * self._error(vector)
            certain = float(ranking.scores[-1]) > float(proposed[row].min()) + margin
            float32 = float(np.abs(proposed[row].astype(np.float64) - scores[row]).max()) <= margin
            rankings.append(ranking if certain and float32 else self._scan(vector, k))
        return rankings

    def _propose(self, vectors: NDArray[np.float32], fetch: int) -> Found:
        """faiss's scores and ids of the `fetch` best for each query vector, [n, fetch] each, in no order."""
        slices = max(1, min(self._threads, len(self._vectors) // _SLICE))
        edges = [len(self._vectors) * edge // slices for edge in range(slices + 1)]
        parts = list(zip(edges, edges[1:], strict=False))
        return _best(self._in_threads(lambda part: self._propose_from(vectors, fetch, *part), parts), fetch)

    def _propose_from(self, vectors: NDArray[np.float32], fetch: int, start: int, stop: int) -> Found:
        blas = self._vectors.kind == "float32" and vectors.size >= self._blas_threshold
        whole = blas or len(vectors) == 1  # BLAS has tiles of its own, and one query passes only once
        tile = stop - start if whole else max(1, _TILE // self._vectors.stored[0].nbytes)
        found: list[Found] = []
        for first in range(start, stop, tile):
            last = min(first + tile, stop)
            scores, ids = self._vectors.as_faiss(first, last).search(vectors, min(fetch, last - first))
            found.append((scores, ids + first))
            if len(found) == _PENDING:
                found = [_best(found, fetch)]
        return _best(found, fetch)

    def _scan(self, vector: Vector, k: int) -> Ranking:
        """The k best by scoring every vector: exact without any bound, one query at a time."""
        scores = np.concatenate([self._score_all(vector, rows) for _, rows in self._vectors.blocks()])
        return rank(np.arange(len(scores), dtype=np.int64), scores, k)

    def _error(self, vector: Vector) -> float:
        """e of the class's docstring for the longest vector, and a hundredth more for this computation's own error."""
        du = self._dimension * _ROUNDING
        length = float(np.linalg.norm(vector.astype(np.float64)))
        return 1.01 * (du / (1 - du) * length * self._vectors.longest + 2 * self._dimension * _TINY)


def _best(found: list[Found], fetch: int) -> Found:
    """The `fetch` largest scores of each row, with their ids, out of several pieces' results."""
    if len(found) == 1:
        return found[0]
    scores, ids = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    if scores.shape[1] <= fetch:
        return scores, ids
    kept = np.argpartition(scores, -fetch, axis=1)[:, -fetch:]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(ids, kept, axis=1)
