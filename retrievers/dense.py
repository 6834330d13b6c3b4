"""Exact dense retrieval: every vector is compared with the query."""

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from .base import Document, Query, Ranking, Vector
from .codes import Codes
from .drift import product_bound
from .encoder import QueryEncoder
from .flat import Flat
from .kernel import OneKernel, Source
from .passages import Passages
from .proposals import Found, Proposer, Scan, largest
from .ranking import rank
from .vectors import Memory, Vectors

_SLICE = 4096  # vectors; fewer are not worth a thread's while


class ExactDense(OneKernel):
    """The k largest scores over all vectors (inner products, or minus squared L2 distances), exact, with ties by id.

    **A faster scan only proposes.** It finds candidates fast, but in another arithmetic: rounded vectors, another order
    of sums. So candidates are scored again by the one kernel (`OneKernel`).

    **Why no document is missed.** Let m(s) be the most by which the scan's score of a pair and ours can differ where
    ours is s, and s - m(s) grow with s: `Codes` and `Flat` prove theirs. The scan returns the `fetch` largest of its
    own scores; whatever it left out has a score of at most the smallest it returned, w. Let s_k be the k-th largest of
    the scores that ours gives the candidates. A document left out that passed or tied it would have the scan's score of
    at least s_k - m(s_k). So if s_k > w + m(s_k), there is none. If not (long runs of equal or nearly equal vectors),
    the query is tried again with a larger `fetch`, then with the next scan, and if nothing is enough, answered by
    scoring every vector with our kernel. Scanned in pieces, each piece gives its `fetch` largest and the `fetch`
    largest of all those are kept: what a piece left out is no larger than its smallest, hence than w, so the same
    holds. A scan that computed in less than its bound assumes would give scores farther from ours; a query for which
    one candidate's is farther than m is answered by scoring every vector, at once. Among the candidates, too, only
    those are scored that can still reach the k-th by ours of the k best by the scan's.

    `embeddings` is what `Vectors.open` takes, one vector a passage, as wide as the encoder's; `memory` says where they
    are searched, `scan` in what: "codes" (`Codes`, then `Flat`) holds a copy of a byte a number besides the vectors,
    made when the index is opened; "stored" (`Flat` alone) holds none. Rankings and scores are bit for bit the same. By
    codes, the vectors themselves are read for candidates only, so they may as well stay in their file. Without them,
    half precision needs half the memory and is scanned nearly twice as fast for a few queries; from about 16 on float32
    is faster.

    `threads` each scan a part of the vectors, for one query as for many; see `OneKernel`. `blas_threshold`: see `Flat`.
    """

    def __init__(
        self,
        passages: Passages | Sequence[Document],
        embeddings: Source,
        encoder: QueryEncoder,
        *,
        memory: Memory = "float32",
        scan: Scan = "codes",
        threads: int = 1,
        blas_threshold: int | None = None,
    ) -> None:
        if scan not in get_args(Scan):
            raise ValueError(f"vectors are scanned in {' or '.join(get_args(Scan))}, not {scan!r}")
        super().__init__(passages, embeddings, encoder, memory=memory, threads=threads)
        self._scan_over(self._vectors, scan, blas_threshold)

    def _scan_over(self, vectors: Vectors, scan: Scan, blas_threshold: int | None) -> None:
        """Searches go over these vectors from now on."""
        self._vectors = vectors
        self._codes = Codes.of(vectors) if scan == "codes" else None
        flat = Flat(vectors, blas_threshold)
        self._proposers: list[Proposer] = [flat] if self._codes is None else [self._codes, flat]

    @property
    def description(self) -> str:
        """What a report calls this retriever."""
        how = "faiss flat scan" if self._codes is None else f"int8 scan ({self._codes.nbytes >> 20:,} MiB of codes)"
        return f"exact dense, {self._vectors.description}, {how}"

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The k best documents of each encoded query (all, if there are fewer). Blocking."""
        vectors = self._query_vectors(queries, k)
        k = min(k, len(self))
        rankings: list[Ranking | None] = [None] * len(vectors)
        for proposer in self._proposers:
            for fetch in proposer.tries(k):
                left = [row for row, ranking in enumerate(rankings) if ranking is None]
                if left and fetch < len(self._vectors):
                    for row, ranking in zip(left, self._among(proposer, fetch, vectors[left], k), strict=True):
                        rankings[row] = ranking
        both = zip(vectors, rankings, strict=True)
        return [self._scan(vector, k) if ranking is None else ranking for vector, ranking in both]

    def bound(self, query: Query, past: Query, found: Ranking) -> float:
        """As `Bounding.bound`; of squared distances nothing is said. `longest` may be off by a thousandth."""
        if len(found.ids) == len(self._vectors):
            return -math.inf
        if self._vectors.metric != "inner product":
            return math.inf
        floor, longest = float(found.scores[-1]), 1.002 * self._vectors.longest
        return product_bound(self._vector(query), self._vector(past), floor, longest)

    def _among(self, proposer: Proposer, fetch: int, vectors: NDArray[np.float32], k: int) -> list[Ranking | None]:
        """The k best for each query vector, found among `fetch` candidates; None where one may have been missed."""
        proposed, candidates = self._propose(proposer, vectors, fetch)
        order = np.argpartition(proposed, fetch - k, axis=1)
        first = np.take_along_axis(candidates, order[:, fetch - k :], axis=1)
        known = self._score_ids(vectors, first)
        rankings: list[Ranking | None] = []
        for row, vector in enumerate(vectors):
            floor = known[row].min(keepdims=True)
            rest = order[row, : fetch - k]
            rest = rest[proposed[row, rest] >= floor - proposer.margins(vector, floor)]  # the others cannot reach it
            more = self._score_ids(vectors[[row]], candidates[[row]][:, rest])[0]
            scores = np.concatenate([known[row], more])
            ranking = rank(np.concatenate([first[row], candidates[row, rest]]), scores, k)
            margins = proposer.margins(vector, np.append(ranking.scores[-1], scores))
            theirs = proposed[row, np.concatenate([order[row, fetch - k :], rest])].astype(np.float64)
            certain = float(ranking.scores[-1]) > float(proposed[row].min()) + margins[0]
            believable = (np.abs(theirs - scores) <= margins[1:]).all()
            rankings.append((ranking if certain else None) if believable else self._scan(vector, k))
        return rankings

    def _propose(self, proposer: Proposer, vectors: NDArray[np.float32], fetch: int) -> Found:
        """The scan's scores and ids of the `fetch` best for each query vector, [n, fetch] each, in no order."""
        slices = max(1, min(self._threads, len(self._vectors) // _SLICE))
        edges = [len(self._vectors) * edge // slices for edge in range(slices + 1)]
        parts = list(zip(edges, edges[1:], strict=False))
        return largest(self._in_threads(lambda part: proposer.propose(vectors, fetch, *part), parts), fetch)

    def _scan(self, vector: Vector, k: int) -> Ranking:
        """The k best by scoring every vector: exact without any bound, one query at a time."""
        scores = np.concatenate([self._score_all(vector, rows) for _, rows in self._vectors.blocks()])
        return rank(np.arange(len(scores), dtype=np.int64), scores, k)
