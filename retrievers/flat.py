"""Proposals from the stored vectors themselves, by faiss."""

import numpy as np
from numpy.typing import NDArray

from .base import Scores, Vector
from .proposals import Found, largest
from .vectors import Vectors

ROUNDING = 2.0**-24  # u: half the distance from 1 to the next float32
TINY = 2.0**-126  # the smallest normal float32; below it a product or sum may lose everything
_TILE = 6 << 20  # bytes of vectors that stay in the cache while one query after the other passes over them
_FEW = 256  # candidates; of more, gathering them tile by tile costs more than the tiles save
_PENDING = 64  # results of tiles that wait to be merged


class Flat:
    """What faiss finds among all vectors, as they are stored: no memory besides theirs.

    It has another kernel for large batches (BLAS) and for half precision than the one that scores, with sums in another
    order. float16 and bfloat16 are decoded exactly, so all is float32 arithmetic.

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

    `blas_threshold`: faiss turns to BLAS when queries × dimension reaches this; None for eight queries. The switch
    belongs to the whole process, and constructing this class sets it: at faiss's own 128,000 a batch of 16 is as dear
    as 16 searches. Smaller batches pass over the vectors tile by tile, so that each is fetched from memory once, unless
    hundreds of documents are wanted.
    """

    def __init__(self, vectors: Vectors, blas_threshold: int | None = None) -> None:
        import faiss

        self._vectors = vectors
        self._blas_threshold = 8 * vectors.dimension if blas_threshold is None else blas_threshold
        if hasattr(faiss.cvar, "distance_compute_blas_threshold"):  # not every build shows it
            faiss.cvar.distance_compute_blas_threshold = self._blas_threshold

    def tries(self, k: int) -> tuple[int, ...]:
        """k, and an eighth more to put distance between the k-th and what was left out; then many more."""
        fetch = k + max(8, k // 8)
        return fetch, 8 * fetch + 1024

    def propose(self, vectors: NDArray[np.float32], fetch: int, start: int, stop: int) -> Found:
        """As `Proposer.propose`; scores are float32."""
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
                found = [largest(found, fetch)]
        return largest(found, fetch)

    def margins(self, vector: Vector, scores: Scores) -> NDArray[np.float64]:
        """m of the class's docstring for each of our scores, and a hundredth more for this computation's own error."""
        d, longest = self._vectors.dimension, self._vectors.longest
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if self._vectors.metric == "inner product":
            return np.full(len(scores), 1.01 * 2 * product_error(d, length, longest))
        g, lost = distance_error(d, length, longest)
        true = (lost - scores.astype(np.float64)) / (1 - g)
        margins: NDArray[np.float64] = g * (length + np.minimum(longest, length + np.sqrt(true))) ** 2 + g * true + lost
        return 1.01 * margins


def product_error(d: int, length: float, longest: float) -> float:
    """e of `Flat`: how far a float32 inner product of vectors no longer than these can be from the true one."""
    return d * ROUNDING / (1 - d * ROUNDING) * length * longest + 2 * d * TINY


def distance_error(d: int, length: float, longest: float) -> tuple[float, float]:
    """g and z of `Flat`: a squared distance summed from squares in float32 is off by at most g·D + z."""
    return (d + 2) * ROUNDING / (1 - (d + 2) * ROUNDING), 16 * d * TINY * (1 + length + longest)
