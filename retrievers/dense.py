"""Exact dense retrieval: every vector is compared with the query."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Document, Query, Ranking, Scores, Vector
from .encoder import QueryEncoder
from .kernel import OneKernel, Source
from .passages import Passages
from .ranking import rank
from .vectors import Memory

_ROUNDING = 2.0**-24  # u: half the distance from 1 to the next float32
_TINY = 2.0**-126  # the smallest normal float32; below it a product or sum may lose everything
_TILE = 6 << 20  # bytes of vectors that stay in the cache while one query after the other passes over them
_SLICE = 4096  # vectors; fewer are not worth a thread's while
_FEW = 256  # candidates; of more, gathering them tile by tile costs more than the tiles save
_PENDING = 64  # results of tiles that wait to be merged
_WIDER = 1024  # candidates, more than eight times the first try's, of a second try

Found = tuple[NDArray[np.float32], NDArray[np.int64]]


class ExactDense(OneKernel):
    """The k largest scores over all vectors (inner products, or minus squared L2 distances), exact, with ties by id.

    **faiss only proposes.** It finds candidates fast, but with another kernel for large batches (BLAS) and for half
    precision, whose sums run in another order: the same pair then differs in its last bits, and two nearly equal
    documents change places with the size of the batch. So candidates are scored again by the one kernel (`OneKernel`).

    **Why no document is missed.** Let m(s) be the most by which faiss's score of a pair and ours can differ where ours
    is s; it must not grow with s. faiss returns the `fetch` largest of its own scores; whatever it left out has a score
    of at most the smallest it returned, w. Let s_k be the k-th largest of the scores that ours gives the candidates. A
    document left out that passed or tied it would have faiss's score of at least s_k - m(s_k). So if s_k > w + m(s_k),
    there is none. If not (long runs of equal or nearly equal vectors), the query is tried again with a larger `fetch`,
    and if that is not enough, answered by scoring every vector with our kernel. Scanned in pieces, each piece gives its
    `fetch` largest and the `fetch` largest of all those are kept: what a piece left out is no larger than its smallest,
    hence than w, so the same holds. float16 and bfloat16 are decoded exactly. The bounds are for float32 arithmetic. A
    faiss that multiplied in less would give scores farther from ours; a query for which one candidate's is farther
    than m is answered by scoring every vector, at once.

    **m for the inner product.** Let u = 2^-24, d the dimension, g_n = n·u / (1 - n·u). In float32, summed in whatever
    order, fused or not, an inner product of q and x is off by at most e = g_d·|q|·|x|: each of the d products passes
    through at most d roundings, and the sum of the |q_i·x_i| is at most |q|·|x| (Cauchy-Schwarz); where products fall
    below the normal float32 range, 2·d·2^-126 is lost at most besides. m = 2e, one e for faiss's error and one for
    ours, e taken for the longest vector, L.

    **m for the squared distance.** Let D be the true one, g = g_(d+2). Our kernel sums squares of differences, all
    positive: each passes through at most d + 2 roundings (two are the difference's, squared), so our distance is off by
    at most g·D, and from ours, t, follows D <= T = (t + z) / (1 - g). z = 16·d·2^-126·(1 + |q| + L) is more than all
    kernels together lose where numbers fall below the normal range. faiss sums as we do, or, by BLAS, takes
    |q|² + |x|² - 2·q·x: each product passes through at most d roundings and two more in putting the three sums
    together, and all products are at most (|q| + |x|)² in sum, which bounds D, too; so faiss is off by at most
    g·(|q| + |x|)², whichever way it went, and raising a result below 0 to 0 only helps. As |x| is at most L and at most
    |q| + sqrt(D), m = g·(|q| + min(L, |q| + sqrt(T)))² + g·T + z, with -t for s: it falls as s rises, and a few
    vectors much longer than the rest cost nothing.

    `embeddings` is what `Vectors.open` takes, one vector a passage, as wide as the encoder's; `memory` says where they
    are searched. Rankings and scores are bit for bit the same. Half precision needs half the memory and is scanned
    nearly twice as fast for a few queries; from about 16 on float32 is faster.

    `threads` each scan a part of the vectors, for one query as for many; see `OneKernel`.

    `blas_threshold`: faiss turns to BLAS when queries × dimension reaches this; None for eight queries. The switch
    belongs to the whole process, and constructing this class sets it: at faiss's own 128,000 a batch of 16 is as dear
    as 16 searches. Smaller batches pass over the vectors tile by tile, so that each is fetched from memory once, unless
    hundreds of documents are wanted.
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
        return f"exact dense, {self._vectors.description}, faiss flat scan"

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The k best documents of each encoded query (all, if there are fewer). Blocking."""
        vectors = self._query_vectors(queries, k)
        k = min(k, len(self))
        fetch = k + max(8, k // 8)  # the spare ones put distance between the k-th and what was left out
        rankings: list[Ranking | None] = [None] * len(vectors)
        for tried in (fetch, 8 * fetch + _WIDER):
            left = [row for row, ranking in enumerate(rankings) if ranking is None]
            if left and tried < len(self._vectors):
                for row, ranking in zip(left, self._among(tried, vectors[left], k), strict=True):
                    rankings[row] = ranking
        both = zip(vectors, rankings, strict=True)
        return [self._scan(vector, k) if ranking is None else ranking for vector, ranking in both]

    def _among(self, fetch: int, vectors: NDArray[np.float32], k: int) -> list[Ranking | None]:
        """The k best for each query vector, found among `fetch` candidates; None where one may have been missed."""
        proposed, candidates = self._propose(vectors, fetch)
        scores = self._score_ids(vectors, candidates)
        rankings: list[Ranking | None] = []
        for row, vector in enumerate(vectors):
            ranking = rank(candidates[row], scores[row], k)
            margins = self._margins(vector, np.append(ranking.scores[-1], scores[row]))
            certain = float(ranking.scores[-1]) > float(proposed[row].min()) + margins[0]
            float32 = (np.abs(proposed[row].astype(np.float64) - scores[row]) <= margins[1:]).all()
            rankings.append((ranking if certain else None) if float32 else self._scan(vector, k))
        return rankings

    def _propose(self, vectors: NDArray[np.float32], fetch: int) -> Found:
        """faiss's scores and ids of the `fetch` best for each query vector, [n, fetch] each, in no order."""
        slices = max(1, min(self._threads, len(self._vectors) // _SLICE))
        edges = [len(self._vectors) * edge // slices for edge in range(slices + 1)]
        parts = list(zip(edges, edges[1:], strict=False))
        return _best(self._in_threads(lambda part: self._propose_from(vectors, fetch, *part), parts), fetch)

    def _propose_from(self, vectors: NDArray[np.float32], fetch: int, start: int, stop: int) -> Found:
        blas = self._vectors.kind == "float32" and vectors.size >= self._blas_threshold
        whole = blas or len(vectors) == 1 or fetch > _FEW  # BLAS has tiles of its own, and one query passes only once
        tile = stop - start if whole else max(1, _TILE // self._vectors.stored[0].nbytes)
        found: list[Found] = []
        for first in range(start, stop, tile):
            last = min(first + tile, stop)
            scores, ids = self._vectors.as_faiss(first, last).search(vectors, min(fetch, last - first))
            if self._vectors.metric == "squared L2":
                np.negative(scores, out=scores)
            found.append((scores, ids + first))
            if len(found) == _PENDING:
                found = [_best(found, fetch)]
        return _best(found, fetch)

    def _scan(self, vector: Vector, k: int) -> Ranking:
        """The k best by scoring every vector: exact without any bound, one query at a time."""
        scores = np.concatenate([self._score_all(vector, rows) for _, rows in self._vectors.blocks()])
        return rank(np.arange(len(scores), dtype=np.int64), scores, k)

    def _margins(self, vector: Vector, scores: Scores) -> NDArray[np.float64]:
        """m of the class's docstring for each of our scores, and a hundredth more for this computation's own error."""
        d, longest, length = self._dimension, self._vectors.longest, float(np.linalg.norm(vector.astype(np.float64)))
        if self._vectors.metric == "inner product":
            error = d * _ROUNDING / (1 - d * _ROUNDING) * length * longest + 2 * d * _TINY
            return np.full(len(scores), 1.01 * 2 * error)
        g, lost = (d + 2) * _ROUNDING / (1 - (d + 2) * _ROUNDING), 16 * d * _TINY * (1 + length + longest)
        true = (lost - scores.astype(np.float64)) / (1 - g)
        margins: NDArray[np.float64] = g * (length + np.minimum(longest, length + np.sqrt(true))) ** 2 + g * true + lost
        return 1.01 * margins


def _best(found: list[Found], fetch: int) -> Found:
    """The `fetch` largest scores of each row, with their ids, out of several pieces' results."""
    if len(found) == 1:
        return found[0]
    scores, ids = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    if scores.shape[1] <= fetch:
        return scores, ids
    kept = np.argpartition(scores, -fetch, axis=1)[:, -fetch:]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(ids, kept, axis=1)
