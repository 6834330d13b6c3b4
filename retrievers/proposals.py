"""Fast scans that propose candidates: what they owe to whoever scores these again."""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .base import Scores, Vector

Found = tuple[NDArray[np.floating], NDArray[np.int64]]
"""Scores and ids of candidates, [queries, candidates] each, in no order."""


Scan = Literal["codes", "stored"]
"""What an exact search passes over: a copy of one byte a number (`Codes`), or the vectors as they are stored."""


class Proposer(Protocol):
    """Finds, by scores of its own, candidates that hold the best by ours; `ExactDense` tells when they surely do.

    Called by several threads at once, each with one OpenMP thread.
    """

    def tries(self, k: int) -> tuple[int, ...]:
        """How many candidates to ask for: so many that they nearly always hold the k best, then more."""

    def propose(self, vectors: NDArray[np.float32], fetch: int, start: int, stop: int) -> Found:
        """The `fetch` largest of its scores among vectors start to stop (all, if there are fewer), for each query."""

    def margins(self, vector: Vector, scores: Scores) -> NDArray[np.float64]:
        """m(s) for each of our scores s of this query: the most by which its score and ours can differ.

        Not only is |its - ours| <= m(ours); what has our score of s or more has its score of s - m(s) or more.
        """


def largest(found: list[Found], fetch: int) -> Found:
    """The `fetch` largest scores of each row, with their ids, out of several pieces' results."""
    if len(found) == 1:
        return found[0]
    scores, ids = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    if scores.shape[1] <= fetch:
        return scores, ids
    kept = np.argpartition(scores, -fetch, axis=1)[:, -fetch:]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(ids, kept, axis=1)
