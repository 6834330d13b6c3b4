"""Exact dense retrieval: every vector is compared with the query, by inner product."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Document, Ids, Query, Ranking, Scores, Vector
from .encoder import QueryEncoder
from .errors import BadKnowledge, MissingExtra, RetrieverFailed
from .passages import Passages
from .ranking import rank

Vectors = NDArray[np.float32]

_CHUNK = 8192  # vectors converted and checked at once
_ROUNDING = 2.0**-24  # u: half the distance from 1 to the next float32
_TINY = 2.0**-126  # the smallest normal float32; below it a product or sum may lose everything
_LARGEST = 1e38  # scores stay under this, a third of what float32 can hold


class ExactDense:
    """The k largest inner products over all vectors, exact in float32, with ties by id.

    **One kernel gives every score.** faiss finds candidates fast, but with another kernel for large batches (BLAS),
    whose sums run in another order: the same pair then differs in its last bits, and two nearly equal documents change
    places with the size of the batch. So faiss only proposes. Candidates are scored again by
    `fvec_inner_products_by_idx`, which treats each pair alone, and `score` uses the same function: a score depends on
    the two vectors and on nothing else.

    **Why no document is missed.** Let u = 2^-24 and d the dimension. In float32, summed in whatever order, fused or
    not, an inner product of q and x is off by at most e = g·|q|·|x|, g = d·u / (1 - d·u): each of the d products passes
    through at most d roundings, and the sum of the |q_i·x_i| is at most |q|·|x| (Cauchy-Schwarz); where products fall
    below the normal float32 range, 2·d·2^-126 is lost at most besides. faiss returns the `fetch` largest of its own
    scores; whatever it left out has a score of at most the smallest it returned, w. Scored again, such a document
    could gain e for faiss's error and e for ours, so it stays at or below w + 2e, e taken for the longest vector.
    If the k-th document scored again lies strictly above w + 2e, none left out can pass or even tie it. If it does
    not (long runs of equal or nearly equal vectors), that query is answered by scoring every vector with our kernel.
    The bound is for float32 arithmetic; a faiss built to multiply in bfloat16 would break it.

    `embeddings` is a .npy file or array of float16 or float32, [len(passages), encoder.dimension]; it is copied once,
    to float32 in memory. `passages` and vectors that do not fit raise `BadKnowledge`, a query whose vector is missing,
    misshapen, not finite or too long raises `RetrieverFailed`.

    `threads` share the queries of one search. faiss keeps that number per calling thread, so it is set at every call; a
    query and the scores of a few documents never take more than one.

    `blas_threshold`: faiss turns to BLAS when queries × dimension reaches this. The switch belongs to the whole
    process, and constructing this class sets it. faiss's own 128,000 makes a batch of 16 as dear as 16 searches.
    """

    concurrency = 1

    def __init__(
        self,
        passages: Passages | Sequence[Document],
        embeddings: str | Path | NDArray[Any],
        encoder: QueryEncoder,
        *,
        threads: int = 1,
        blas_threshold: int = 2000,
    ) -> None:
        try:
            import faiss
        except ImportError:
            raise MissingExtra("ExactDense needs: pip install 'ralmspec[local]'") from None
        if threads < 1:
            raise ValueError(f"a search needs at least 1 thread, not {threads}")
        self._faiss: Any = faiss
        self._threads = threads
        if hasattr(faiss.cvar, "distance_compute_blas_threshold"):  # not every build shows it
            faiss.cvar.distance_compute_blas_threshold = blas_threshold
        self._passages = passages
        self._encoder = encoder
        self._dimension = encoder.dimension
        self._hold(read_vectors(embeddings, len(passages), encoder.dimension))

    def _hold(self, vectors: Vectors) -> None:
        """Serves these vectors, float32 [at least one per passage, dimension]."""
        self._vectors = vectors
        self._longest = max(
            float(np.linalg.norm(vectors[start : start + _CHUNK].astype(np.float64), axis=1).max())
            for start in range(0, len(vectors), _CHUNK)
        )

    @property
    def description(self) -> str:
        """What a report calls this retriever."""
        return f"exact dense, {len(self._vectors):,} x {self._dimension} float32, faiss flat scan"

    def __len__(self) -> int:
        return len(self._passages)

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        """The queries with vectors; only those that lack one are encoded. Blocking."""
        bare = [query.text for query in queries if query.vector is None]
        vectors = self._encoder.encode(bare) if bare else ()
        if len(vectors) != len(bare):
            raise RetrieverFailed(f"the query encoder returned {len(vectors)} vectors for {len(bare)} texts")
        fresh = iter(vectors)
        encoded = [query if query.vector is not None else replace(query, vector=next(fresh)) for query in queries]
        for query in encoded:
            self._vector(query)
        return encoded

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The k best documents of each encoded query (all, if there are fewer). Blocking."""
        if k < 1:
            raise ValueError(f"a search is for at least 1 document, not {k}")
        if not queries:
            return []
        vectors = np.stack([self._vector(query) for query in queries])
        k = min(k, len(self))
        fetch = k + max(8, k // 8)  # the spare ones put distance between the k-th and what was left out
        if fetch >= len(self._vectors):
            return [self._scan(vector, k) for vector in vectors]
        self._faiss.omp_set_num_threads(self._threads)
        approximate, candidates = self._faiss.knn(
            vectors, self._vectors, fetch, metric=self._faiss.METRIC_INNER_PRODUCT
        )
        scores = self._inner_products(vectors, self._vectors, candidates)
        rankings = []
        for row, vector in enumerate(vectors):
            ranking = rank(candidates[row], scores[row], k)
            certain = float(ranking.scores[-1]) > float(approximate[row].min()) + 2 * self._error(vector)
            rankings.append(ranking if certain else self._scan(vector, k))
        return rankings

    def rows(self, ids: Ids) -> Vectors:
        """The documents' vectors, copied, float32 [n, dimension]."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise BadKnowledge(f"asked for vectors of documents {ids.min()} to {ids.max()}; there are {len(self)}")
        return self._vectors[ids]

    def score(self, query: Query, rows: NDArray[Any]) -> Scores:
        """Inner products of an encoded query with `rows`, float32 [n], bitwise those of `search`."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != self._dimension:
            raise RetrieverFailed(f"rows must be [n, {self._dimension}], not {list(rows.shape)}")
        every = np.arange(len(rows), dtype=np.int64)[np.newaxis]
        scores: Scores = self._inner_products(self._vector(query)[np.newaxis], rows, every)[0]
        return scores

    def document(self, id: int) -> Document:
        """The passage itself. Thread-safe."""
        return self._passages[id]

    def _scan(self, vector: Vector, k: int) -> Ranking:
        """The k best by scoring every vector: exact without any bound, one query at a time."""
        every = np.arange(len(self._vectors), dtype=np.int64)
        return rank(every, self._inner_products(vector[np.newaxis], self._vectors, every[np.newaxis])[0], k)

    def _inner_products(self, queries: Vectors, rows: Vectors, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The one kernel: queries [n, d] with rows[ids], ids [n, m] -> [n, m]. All contiguous, every id in rows."""
        (n, m), pointer = ids.shape, self._faiss.swig_ptr
        products = np.empty((n, m), dtype=np.float32)
        self._faiss.omp_set_num_threads(1)  # too little work to wake a team of threads for
        self._faiss.fvec_inner_products_by_idx(
            pointer(products), pointer(queries), pointer(rows), pointer(ids), self._dimension, n, m
        )
        return products

    def _error(self, vector: Vector) -> float:
        """e of the class's docstring for the longest vector, and a hundredth more for this computation's own error."""
        du = self._dimension * _ROUNDING
        length = float(np.linalg.norm(vector.astype(np.float64)))
        return 1.01 * (du / (1 - du) * length * self._longest + 2 * self._dimension * _TINY)

    def _vector(self, query: Query) -> Vector:
        """The query's vector, contiguous float32 [dimension], checked: what follows hands its address to faiss."""
        if query.vector is None:
            raise RetrieverFailed(f"the query {query.text!r} has no vector: pass it through encode() first")
        vector = np.ascontiguousarray(query.vector, dtype=np.float32)
        if vector.shape != (self._dimension,):
            raise RetrieverFailed(f"a query's vector must be [{self._dimension}], not {list(vector.shape)}")
        # One comparison refuses NaN, infinity, and whatever could make a score overflow.
        if not float(np.abs(vector).max()) * self._dimension**0.5 * self._longest < _LARGEST:
            raise RetrieverFailed(f"the vector of the query {query.text!r} is not finite, or too long for float32")
        return vector


def read_vectors(embeddings: str | Path | NDArray[Any], count: int, dimension: int) -> Vectors:
    """Embeddings as float32 [count, dimension], copied, every element finite; else `BadKnowledge` naming the file."""
    name, stored = ("embeddings", embeddings) if isinstance(embeddings, np.ndarray) else _open(Path(embeddings))
    if stored.dtype not in (np.float16, np.float32):
        raise BadKnowledge(f"{name}: holds {stored.dtype}; store the vectors as float16 or float32")
    if stored.ndim != 2:
        raise BadKnowledge(f"{name}: has shape {list(stored.shape)}; expected one vector a passage, two axes")
    if len(stored) != count or count == 0:
        raise BadKnowledge(
            f"{name}: {len(stored)} vectors for {count} passages; embed exactly these passages, in order"
        )
    if stored.shape[1] != dimension:
        raise BadKnowledge(
            f"{name}: vectors are {stored.shape[1]} wide, the query encoder's {dimension}; use the one that made them"
        )
    vectors = np.empty((count, dimension), dtype=np.float32)
    for start in range(0, count, _CHUNK):
        chunk = vectors[start : start + _CHUNK]
        chunk[:] = stored[start : start + _CHUNK]
        finite = np.isfinite(chunk).all(axis=1)
        if not finite.all():
            raise BadKnowledge(
                f"{name}: vector {start + int(np.argmin(finite))} is not finite; embed that passage again"
            )
    return vectors


def _open(path: Path) -> tuple[str, NDArray[Any]]:
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise BadKnowledge(f"{path}: there is no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise BadKnowledge(f"{path}: is no readable .npy file ({error}); write it again with numpy.save") from error
    if not isinstance(stored, np.ndarray):
        raise BadKnowledge(f"{path}: holds several arrays; store the vectors alone with numpy.save")
    return str(path), stored
