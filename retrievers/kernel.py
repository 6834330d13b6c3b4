"""What all dense retrievers share: the passages, their vectors, and the one kernel that gives every score."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .base import Document, Ids, Query, Scores, Vector
from .encoder import QueryEncoder
from .errors import BadKnowledge, MissingExtra, RetrieverFailed
from .passages import Passages
from .vectors import Memory, Vectors

Source = str | Path | NDArray[Any] | Vectors
"""A .npy file, an array, or vectors that are open already; see `Vectors.open`."""

_LARGEST = 1e38  # scores stay under this, a third of what float32 can hold

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


class OneKernel:
    """Everything of a dense retriever but `search` and `description`, which its subclasses add.

    A *score* is the inner product, or where the vectors' metric is the squared L2 distance, minus that distance: the
    larger, the better, either way.

    **One kernel gives every score:** faiss's `fvec_inner_products_by_idx`, or `fvec_L2sqr_by_idx`, which sums squares
    of differences, so that equal vectors have the distance 0 exactly. Both treat each pair of vectors alone, in
    float32, so a score depends on the two vectors and on nothing else: not on the batch, the number of threads, where
    the vectors lie, or which index proposed the document. `score` and every `search` use it, so
    `score(query, rows(ids))` is bit for bit what `search` reports. Vectors stored in half precision become float32
    exactly, before the kernel sees them.

    The metric is that of the vectors: `Vectors.open(..., metric=...)`; a file or an array is searched by inner product.

    `passages` and vectors that do not fit each other or the encoder raise `BadKnowledge`; a query whose vector is
    missing, misshapen, not finite or too long raises `RetrieverFailed`.

    `threads` share the work of one search, a single query's too. They are threads of ours, each with one OpenMP
    thread, so no OpenMP team is ever woken whose waiting threads would spin beside the model's. They end with the
    retriever.
    """

    concurrency = 1

    def __init__(
        self,
        passages: Passages | Sequence[Document],
        vectors: Source,
        encoder: QueryEncoder,
        *,
        memory: Memory = "map",
        threads: int = 1,
    ) -> None:
        try:
            import faiss
        except ImportError:
            raise MissingExtra(f"{type(self).__name__} needs: pip install 'ralmspec[local]'") from None
        if threads < 1:
            raise ValueError(f"a search needs at least 1 thread, not {threads}")
        self._faiss: Any = faiss
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ralmspec-search")  # starts none until it is used
        self._passages = passages
        self._encoder = encoder
        self._dimension = encoder.dimension
        self._vectors = Vectors.open(vectors, count=len(passages), dimension=encoder.dimension, memory=memory)

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

    def rows(self, ids: Ids) -> NDArray[np.float32]:
        """The documents' vectors, copied, float32 [n, dimension]."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise BadKnowledge(f"asked for vectors of documents {ids.min()} to {ids.max()}; there are {len(self)}")
        return self._vectors.take(ids)

    def score(self, query: Query, rows: NDArray[Any]) -> Scores:
        """Scores of `rows` for an encoded query, float32 [n], bitwise those of `search`; see the class."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != self._dimension:
            raise RetrieverFailed(f"rows must be [n, {self._dimension}], not {list(rows.shape)}")
        return self._score_all(self._vector(query), rows)

    def document(self, id: int) -> Document:
        """The passage itself. Thread-safe."""
        return self._passages[id]

    def _score_ids(self, vectors: NDArray[np.float32], ids: Ids) -> NDArray[np.float32]:
        """Scores of stored documents: query vectors [n, d], ids [n, m] -> [n, m]."""
        if self._vectors.kind == "float32":
            return self._kernel(vectors, self._vectors.stored, ids)
        # One query after the other: what is widened for one stays in the processor's cache.
        scores = np.empty(ids.shape, dtype=np.float32)
        for row, vector in enumerate(vectors):
            scores[row] = self._score_all(vector, self._vectors.take(ids[row]))
        return scores

    def _score_all(self, vector: Vector, rows: NDArray[np.float32]) -> Scores:
        """Scores of all of these rows [n, d] for one query vector: [n]."""
        every = np.arange(len(rows), dtype=np.int64)
        scores: Scores = self._kernel(vector[np.newaxis], rows, every[np.newaxis])[0]
        return scores

    def _kernel(
        self, vectors: NDArray[np.float32], rows: NDArray[np.float32], ids: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """The kernel: vectors [n, d] with rows[ids], ids [n, m] -> [n, m]. All contiguous, every id in rows."""
        (n, m), pointer = ids.shape, self._faiss.swig_ptr
        scores = np.empty((n, m), dtype=np.float32)
        inner = self._vectors.metric == "inner product"
        kernel = self._faiss.fvec_inner_products_by_idx if inner else self._faiss.fvec_L2sqr_by_idx
        self._faiss.omp_set_num_threads(1)  # faiss keeps this number for each calling thread
        kernel(pointer(scores), pointer(vectors), pointer(rows), pointer(ids), self._dimension, n, m)
        if not inner:
            np.subtract(np.float32(0), scores, out=scores)  # a difference, so that no distance is no minus zero
        return scores

    def _in_threads(self, work: Callable[[_Part], _Result], parts: Sequence[_Part]) -> list[_Result]:
        """`work` on every part, at most `threads` of them at once, each with one OpenMP thread; results in order."""

        def alone(part: _Part) -> _Result:
            self._faiss.omp_set_num_threads(1)
            return work(part)

        if self._threads == 1 or len(parts) == 1:
            return [alone(part) for part in parts]
        return list(self._pool.map(alone, parts))

    def _query_vectors(self, queries: Sequence[Query], k: int) -> NDArray[np.float32]:
        """What a search for k documents starts from: the queries' vectors [n, d], checked."""
        if k < 1:
            raise ValueError(f"a search is for at least 1 document, not {k}")
        vectors = [self._vector(query) for query in queries]
        return np.stack(vectors) if vectors else np.empty((0, self._dimension), dtype=np.float32)

    def _vector(self, query: Query) -> Vector:
        """The query's vector, contiguous float32 [dimension], checked: what follows hands its address to faiss."""
        if query.vector is None:
            raise RetrieverFailed(f"the query {query.text!r} has no vector: pass it through encode() first")
        vector = np.ascontiguousarray(query.vector, dtype=np.float32)
        if vector.shape != (self._dimension,):
            raise RetrieverFailed(f"a query's vector must be [{self._dimension}], not {list(vector.shape)}")
        # One comparison refuses NaN, infinity, and whatever could make a score overflow.
        length, longest = float(np.abs(vector).max()) * self._dimension**0.5, self._vectors.longest
        if not (length * longest if self._vectors.metric == "inner product" else (length + longest) ** 2) < _LARGEST:
            raise RetrieverFailed(f"the vector of the query {query.text!r} is not finite, or too long for float32")
        return vector
