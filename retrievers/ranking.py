"""The one order in which documents stand: higher score first, equal scores by ascending id."""

import numpy as np

from .base import Ids, Ranking, Scores
from .errors import RetrieverFailed


def rank(ids: Ids, scores: Scores, n: int) -> Ranking:
    """The n best of these documents (all, if there are fewer), best first.

    Index and cache both order by this function, so they cannot disagree about a tie.
    Raises `RetrieverFailed` if a score is NaN, which has no place in any order.
    """
    if np.isnan(scores).any():
        raise RetrieverFailed(f"document {ids[np.isnan(scores)][0]} scored NaN: check the query's vector and the index")
    if n < len(scores):
        floor = np.partition(scores, len(scores) - n)[len(scores) - n]
        kept = np.flatnonzero(scores >= floor)  # ties at the floor included: the ids decide among them
        ids, scores = ids[kept], scores[kept]
    order = np.lexsort((ids, -scores))[:n]
    return Ranking(ids[order], scores[order])
