"""What a search tells of the scores for another query: how high a document can score that it left out."""

import math

import numpy as np

from .base import Vector
from .flat import product_error


def product_bound(query: Vector, past: Vector, floor: float, longest: float) -> float:
    """No vector that scored `floor` or less for `past` scores more than this for `query`. Both float32 [d].

    Scores are inner products as computed in float32, no vector is longer than `longest`.

    **Why.** Let p = |past|, L the longest length, and query = c·past + r with r at right angles to past, which gives c
    = query·past / p². Let t = past·x. Of x, a part of length t/p lies along past, so what is left has at most the
    length sqrt(L² - t²/p²), and by Cauchy-Schwarz

        query·x = c·t + r·x <= f(t) = c·t + |r|·sqrt(L² - t²/p²).

    f is concave, with its maximum of L·|query| at t* = p²·L·c / |query|: where x points along query. So among all x
    with t <= s the most is f(min(s, t*)). A score as computed is off by at most e (`product_error`): s is the floor and
    e of `past`, and e of `query` is added to the result. A hundredth more of both covers the rounding of this
    computation, which is in float64.
    """
    asked, before = query.astype(np.float64), past.astype(np.float64)
    size, length = float(np.linalg.norm(asked)), float(np.linalg.norm(before))
    error = 1.01 * product_error(len(asked), size, longest)
    if not size or not length:
        return size * longest + error
    share = float(asked @ before) / length**2  # c
    known = floor + 1.01 * product_error(len(asked), length, longest)  # s
    reached = min(known, length**2 * longest * share / size)  # min(s, t*)
    along = min(longest, max(-longest, reached / length))  # t / p, within -L and L whatever the rounding
    across = float(np.linalg.norm(asked - share * before)) * math.sqrt((longest - along) * (longest + along))
    return share * along * length + across + error
