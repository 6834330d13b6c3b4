"""Exact dense retrieval made as costly as a larger corpus, without changing what it finds."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Document, Query, Ranking
from .dense import ExactDense
from .encoder import QueryEncoder
from .errors import BadKnowledge
from .kernel import Source
from .passages import Passages
from .proposals import Scan
from .vectors import Vectors

_CHUNK = 8192  # distractors made at once


class PaddedDense(ExactDense):
    """`ExactDense` over `pad_to` vectors, all but the first len(passages) of them distractors.

    A distractor lies near a random passage: that passage's direction plus noise of length `noise` (relative to it),
    then cut to length `norm`. So distractors crowd around the same queries as real passages, which keeps score bounds
    and pruning honest, and still score below the real results because they are short. That is checked: a search whose
    results would hold a distractor raises `BadKnowledge`, so whatever is returned is what the real corpus returns.
    On 100,004 Wikipedia passages padded to 1,000,000, the top 256 of each of 130 queries stayed real up to a norm of
    0.34; the default leaves room below that.
    A report must say that the corpus is padded (`description` does). Distractors follow from `seed`. Everything is
    held in memory, in float32, and scanned as `scan` says. Short vectors lose by inner product only: `ValueError` for
    vectors of another metric.
    """

    def __init__(
        self,
        passages: Passages | Sequence[Document],
        embeddings: Source,
        encoder: QueryEncoder,
        *,
        pad_to: int,
        noise: float = 0.5,
        norm: float = 0.25,
        seed: int = 0,
        scan: Scan = "codes",
        threads: int = 1,
        blas_threshold: int | None = None,
    ) -> None:
        super().__init__(passages, embeddings, encoder, scan="stored", threads=threads)
        if self._vectors.metric != "inner product":
            raise ValueError("distractors are short, which makes them poor by inner product only; open the vectors so")
        if pad_to < len(passages):
            raise ValueError(f"cannot pad {len(passages)} passages to {pad_to} vectors")
        self._norm = norm
        real = self._vectors.block(0, len(passages))
        padded = Vectors.open(with_distractors(real, pad_to, noise=noise, norm=norm, seed=seed))
        self._scan_over(padded, scan, blas_threshold)

    @property
    def description(self) -> str:
        """What a report calls this retriever."""
        return f"{super().description}, of which {len(self._vectors) - len(self):,} are distractors (padded corpus)"

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """As `ExactDense.search`; raises `BadKnowledge` where a distractor is among the results."""
        rankings = super().search(queries, k)
        for query, ranking in zip(queries, rankings, strict=True):
            if (ranking.ids >= len(self)).any():
                place = int(np.argmax(ranking.ids >= len(self))) + 1
                raise BadKnowledge(
                    f"a distractor came {place} of {k} for the query {query.text!r}: "
                    f"the padding changes results; make its norm smaller than {self._norm:g} or ask for fewer"
                )
        return rankings


def with_distractors(
    vectors: NDArray[np.float32], total: int, *, noise: float, norm: float, seed: int
) -> NDArray[np.float32]:
    """float32 [total, d]: `vectors`, then distractors, made in chunks so that little more than the result is needed."""
    count, dimension = vectors.shape
    padded = np.empty((total, dimension), dtype=np.float32)
    padded[:count] = vectors
    random = np.random.default_rng(seed)
    for start in range(count, total, _CHUNK):
        chunk = padded[start : start + _CHUNK]
        chunk[:] = vectors[random.integers(count, size=len(chunk))]
        chunk /= np.maximum(np.linalg.norm(chunk, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        chunk += random.standard_normal(chunk.shape, dtype=np.float32) * np.float32(noise / dimension**0.5)
        chunk *= norm / np.maximum(np.linalg.norm(chunk, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return padded
