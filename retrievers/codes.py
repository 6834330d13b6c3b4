"""Proposals from a copy of the vectors in eight bits a number."""

from typing import Self

import numpy as np
from numpy.typing import NDArray

from .base import Scores, Vector
from .flat import ROUNDING, distance_error, product_error
from .int8 import Int8Product
from .proposals import Found
from .vectors import Vectors, over

_BLOCK = 4096  # vectors encoded at once
_TILE = 3 << 20  # bytes of codes multiplied at once: they and their product stay in the cache
_MANY = 4  # queries; fewer are answered faster one at a time, by faiss
_GROUP = 64  # queries multiplied at once; products of more would not stay in the cache
_WIDEST = 32_000  # numbers in a vector; of more, (2·127)² each would not fit int32 in sum
_SPAN = 2.0**60  # the largest number in the vectors lies within this and its inverse, far from float32's ends
_LEAST = np.iinfo(np.int32).min


class Codes:
    """A copy of the vectors, each number rounded to a whole multiple c of one step a, |c| <= 127; made by `of`.

    It takes n·d bytes (and 4·n for distances). The query is rounded likewise, so scores are sums of products of whole
    numbers. Few queries are answered by faiss, in float32, many by one product of int8 matrices, in int32; the ranking
    is exact whichever it was, for the bound below covers both. On one core of an AMD Zen 4, over a million vectors of
    384, one query takes 0.3 of the time of faiss's flat float32 scan; 8 take as long as 3 single ones, 32 as 7.

    **How far the copy is off.** Let x' = a·c be what is stored for x. y = x/a is computed in float32 as a product with
    the float32 number 1/a, so with one rounding, of at most u·|y| (u = 2^-24), c = rint(y), and y - c exactly, for both
    are multiples of y's last place and their difference is below 1. Hence |x - x'| <= a·R for every vector, where R is
    the largest |y - c| plus u·L/a, L the longest vector's length. Numbers lost below the normal float32 range are under
    2^-126 steps; they, the float32 rounding of |y - c| itself, and this computation's own errors, all relatively
    small, are covered by a hundredth that is added.

    **m for the inner product.** The query becomes q' = b·h with its own step b, its largest number being 127 steps.
    q·x - q'·x' = (q - q')·x + q'·(x - x'), so by Cauchy-Schwarz the two differ by at most |q - q'|·L + |q'|·a·R. What
    is computed for q'·x' is a·b times the sum of the h_i·c_i: exact in int32, and in float32 up to d = 1,040, where no
    partial sum exceeds 2^24; beyond that off by at most g_d·|q'|·(L + a·R), which m always contains. Our kernel is off
    by e, see `Flat`. m = |q - q'|·L + |q'|·a·R + g_d·|q'|·(L + a·R) + e, the same for every score.

    **m for the squared distance.** The query is rounded to the vectors' own step, q' = a·h (|h_i| <= 127: one that
    reaches far beyond the vectors is cut, which only makes |q - q'| larger). Distances obey the triangle inequality, so
    with D the true squared distance and D' that of q' and x', |sqrt(D) - sqrt(D')| <= E = |q - q'| + a·R. D' is
    computed as a² times a sum of squares of whole numbers: exact in int32, off by at most g·D' in float32, g = g_(d+2).
    From our distance t follows D <= T = (t + z) / (1 - g), as in `Flat`. So whatever has our distance of at most t has
    its computed D' at most (1 + g)·(sqrt(T) + E)² = t + m. That is m; it grows with t. And D' computed is no smaller
    than (1 - g)·(sqrt(D) - E)² where sqrt(D) > E, and than 0 elsewhere, hence than t - m.
    """

    def __init__(
        self,
        vectors: Vectors,
        codes: NDArray[np.uint8],
        step: float,
        residual: float,
        squares: NDArray[np.int32] | None,
        product: Int8Product | None,
    ) -> None:
        self._vectors = vectors
        self._codes = codes
        self._step = step
        self._residual = residual
        self._squares = squares
        self._product = product

    @classmethod
    def of(cls, vectors: Vectors) -> Self | None:
        """The copy, made block by block in two passes; None for vectors all 0, too wide, or too near float32's ends."""
        peak = max(max(float(rows.max()), -float(rows.min())) for _, rows in vectors.blocks(_BLOCK))
        if not (1 / _SPAN < peak < _SPAN and vectors.dimension <= _WIDEST):
            return None
        inverse = np.float32(127 / peak)
        codes = np.empty(vectors.stored.shape, dtype=np.uint8)
        squares = None if vectors.metric == "inner product" else np.empty(len(vectors), dtype=np.int32)
        farthest = 0.0
        for start, rows in vectors.blocks(_BLOCK):
            parts = rows * inverse
            whole = np.rint(parts)
            parts -= whole
            farthest = max(farthest, float(np.einsum("ij,ij->i", parts, parts).max()))
            if squares is not None:
                squares[start : start + len(rows)] = np.einsum("ij,ij->i", whole, whole, dtype=np.float64)
            whole += 128  # as faiss writes signed bytes
            codes[start : start + len(rows)] = whole
        step = 1 / float(inverse)
        residual = 1.01 * (farthest**0.5 + ROUNDING * vectors.longest / step)
        return cls(vectors, codes, step, residual, squares, Int8Product.find(vectors.dimension))

    @property
    def nbytes(self) -> int:
        """Memory of the copy."""
        return self._codes.nbytes + (0 if self._squares is None else self._squares.nbytes)

    def tries(self, k: int) -> tuple[int, ...]:
        """Of real vectors 1.3 to 2.7 times k came within m, and up to 110 for k = 20."""
        return 3 * k + 256, 12 * k + 1024

    def propose(self, vectors: NDArray[np.float32], fetch: int, start: int, stop: int) -> Found:
        """As `Proposer.propose`; scores are float64."""
        rounded = [self._rounded(vector) for vector in vectors]
        queries = np.array([whole for whole, _ in rounded], dtype=np.int8)
        scale = np.array([[step * self._step] for _, step in rounded])
        fetch = min(fetch, stop - start)
        if len(vectors) >= _MANY and self._product is not None:
            parts = range(0, len(queries), _GROUP)
            done = [self._multiply(self._product, queries[at : at + _GROUP], fetch, start, stop) for at in parts]
            values, ids = (np.concatenate(part) for part in zip(*done, strict=True))
        else:
            import faiss

            signed, metric = faiss.ScalarQuantizer.QT_8bit_direct_signed, self._vectors.faiss_metric
            index = over(faiss.IndexScalarQuantizer(self._vectors.dimension, signed, metric), self._codes[start:stop])
            values, ids = index.search(queries.astype(np.float32), fetch)
            if self._squares is not None:
                np.negative(values, out=values)
            ids = ids + start
        return values * scale, ids

    def margins(self, vector: Vector, scores: Scores) -> NDArray[np.float64]:
        """m of the class's docstring for each of our scores."""
        d, longest, a = self._vectors.dimension, self._vectors.longest, self._step
        whole, step = self._rounded(vector)
        exact = vector.astype(np.float64)
        length, off = float(np.linalg.norm(exact)), float(np.linalg.norm(exact - step * whole))
        g, lost = distance_error(d, length, longest)
        if self._squares is None:
            near = step * float(np.linalg.norm(whole))
            error = off * longest + near * a * self._residual + g * near * (longest + a * self._residual)
            return np.full(len(scores), 1.01 * (error + product_error(d, length, longest)))
        g, off, distances = 1.01 * g, 1.01 * (off + a * self._residual), -scores.astype(np.float64)
        margins: NDArray[np.float64] = (1 + g) * (np.sqrt((distances + lost) / (1 - g)) + off) ** 2 - distances
        return margins

    def _rounded(self, vector: Vector) -> tuple[NDArray[np.float64], float]:
        """The query in whole steps, |h_i| <= 127, and its step."""
        exact = vector.astype(np.float64)
        step = self._step if self._squares is not None else float(np.abs(exact).max()) / 127 or 1.0
        return np.clip(np.rint(exact / step), -127, 127), step

    def _multiply(
        self, product: Int8Product, queries: NDArray[np.int8], fetch: int, start: int, stop: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The `fetch` largest values for each query, tile by tile; of each, only what passes the floor is looked at.

        The floor of a query is the smallest of the `fetch` largest values so far: what does not pass it is not wanted.
        """
        rows = max(1, _TILE // self._vectors.dimension)
        signed = np.empty((min(rows, stop - start), self._vectors.dimension), dtype=np.int8)
        kept = _Largest(len(queries), fetch)
        with product.one_thread():
            for first in range(start, stop, rows):
                last = min(first + rows, stop)
                tile = signed[: last - first]
                np.bitwise_xor(self._codes[first:last], 128, out=tile.view(np.uint8))  # as torch reads signed bytes
                values = product(queries, tile)
                if self._squares is not None:
                    values *= 2
                    values -= self._squares[first:last]
                kept.add(values, first)
        values, ids = kept.result()
        if self._squares is None:
            return values.astype(np.float64), ids
        return values - (queries.astype(np.float64) ** 2).sum(axis=1, keepdims=True), ids


class _Largest:
    """The `count` largest values of each query, while tiles of them come in; at least `count` must come in all."""

    def __init__(self, queries: int, count: int) -> None:
        self._count = count
        self._floors = np.full((queries, 1), _LEAST, dtype=np.int32)
        self._values: list[NDArray[np.int32]] = []
        self._ids: list[NDArray[np.int64]] = []
        self._rows: list[NDArray[np.int64]] = []
        self._held = 0

    def add(self, values: NDArray[np.int32], first: int) -> None:
        """A tile of values, [queries, m], of vectors `first` and on."""
        width = values.shape[1]
        if not self._held and width > self._count:  # a floor at once, or the whole tile would be kept
            self._floors = np.partition(values, width - self._count, axis=1)[:, [width - self._count]] - 1
        passed = np.flatnonzero(values > self._floors)
        rows, places = np.divmod(passed, width)
        self._values.append(values.reshape(-1)[passed])
        self._ids.append(places + first)
        self._rows.append(rows)
        self._held += len(passed)
        if self._held > 3 * self._count * len(self._floors):
            self._cut()

    def result(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Values and ids, [queries, count] each."""
        self._cut()
        shape = (len(self._floors), self._count)
        return self._values[0].reshape(shape), self._ids[0].reshape(shape)

    def _cut(self) -> None:
        """Keeps `count` of each query (all, if it has fewer), in the order of queries, and raises the floors."""
        values, ids, rows = np.concatenate(self._values), np.concatenate(self._ids), np.concatenate(self._rows)
        order = np.argsort(rows, kind="stable")
        edges = np.searchsorted(rows[order], np.arange(len(self._floors) + 1))
        kept = []
        for row, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            mine = order[low:high]
            if len(mine) >= self._count:
                mine = mine[np.argpartition(values[mine], len(mine) - self._count)[len(mine) - self._count :]]
                self._floors[row] = values[mine].min()
            kept.append(mine)
        chosen = np.concatenate(kept)
        self._values, self._ids, self._rows = [values[chosen]], [ids[chosen]], [rows[chosen]]
        self._held = len(chosen)
