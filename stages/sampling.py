"""Chooses a token from logits: greedy, or sampled with numbers that depend only on the seed and the token's position.

Sampling adds one Gumbel number per vocabulary entry and takes the best score, which draws from the softmax. The
numbers are a function of (seed, position, token id), so a token that is decoded again, under another document or after
a rollback, meets the same numbers, and only a change of logits can change it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ModelFailed

Logits = NDArray[np.floating[Any]]
_Scores = NDArray[np.float64]
_Ids = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a session chooses its tokens; the default is greedy.

    `temperature` 0 takes the highest logit, the lowest id among equals. Above 0, the token is drawn from the softmax
    of logits / temperature, among the `top_k` highest (0: all; of equals at the border the lowest ids stay), then among
    the fewest that together hold `top_p` of the probability left. `seed` in [0, 2^64).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"Sampling(temperature={self.temperature}): must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"Sampling(top_k={self.top_k}): must be 0 (all tokens) or the number of tokens to keep")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling(top_p={self.top_p}): must be above 0 and at most 1 (all tokens)")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"Sampling(seed={self.seed}): must be at least 0 and below 2^64")

    def pick(self, logits: Logits, position: int) -> int:
        """The token at `position` (0 for the first generated one) from logits [vocabulary].

        -inf rules a token out. Raises `ModelFailed` for NaN, +inf, or logits that rule every token out.
        """
        best = _best(logits)
        if self.temperature == 0:
            return best
        scaled = self._scale(logits, best)
        ids = _nucleus(scaled, _highest(scaled, self.top_k), self.top_p)
        return int(ids[(scaled[ids] + self._noise(position, len(scaled), ids)).argmax()])

    def gap(self, logits: Logits, position: int) -> float:
        """How near `pick` was to another token: two logits must move against each other by this much to change it.

        Greedy: best logit minus the second best. Sampled: the same of the perturbed scores, in the unit of the logits;
        a token just outside `top_k` or `top_p` that would have won counts with its distance to the border (with
        `top_p` a lower bound, mostly exact). inf where only one token is possible. Raises as `pick` does.
        """
        best = _best(logits)
        if len(logits) == 1:
            return math.inf
        if self.temperature == 0:
            second, first = np.partition(logits, -2)[-2:]
            return float(first) - float(second)
        scaled = self._scale(logits, best)
        candidates = _highest(scaled, self.top_k)
        ids = _nucleus(scaled, candidates, self.top_p)
        scores = scaled + self._noise(position, len(scaled), np.arange(len(scaled)))
        winner = ids[scores[ids].argmax()]
        needed = np.maximum(scores[winner] - scores, 0.0)
        outside = np.isfinite(scaled)
        rivals = outside.copy()
        outside[ids] = False
        lowest, highest = scaled[ids].min(), scaled[outside].max(initial=-math.inf)
        grows, shrinks = _slack(scaled, candidates, ids, self.top_p)
        enters = np.minimum(lowest - scaled[outside], np.maximum(grows, highest - scaled[outside]))
        leaves = min(scaled[winner] - highest, max(shrinks, scaled[winner] - lowest))
        needed[outside] = np.maximum(needed[outside], enters)
        rivals[winner] = False
        return float(min(needed[rivals].min(initial=math.inf), leaves)) * self.temperature

    def _scale(self, logits: Logits, best: int) -> _Scores:
        # Shifted before it is divided, so that no temperature, however small, makes an infinity minus an infinity.
        with np.errstate(over="ignore"):
            scaled: _Scores = (logits.astype(np.float64) - float(logits[best])) / self.temperature
        return scaled

    def _noise(self, position: int, vocabulary: int, ids: _Ids) -> _Scores:
        # The raw stream of a counter-based generator is the same in every numpy; its distributions need not be.
        raw = np.random.Philox(key=self.seed, counter=position << 64).random_raw(vocabulary)[ids]
        uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # never 0, never 1
        noise: _Scores = -np.log(-np.log(uniform))
        return noise


def _best(logits: Logits) -> int:
    """The lowest id of the highest logit; argmax stops at a NaN, so looking at the one value finds them all."""
    best = int(logits.argmax()) if len(logits) else -1
    if best < 0 or not math.isfinite(logits[best]):
        found = "none at all" if best < 0 else f"{logits[best]} at token {best}"
        raise ModelFailed(f"no token can be chosen: the logits are {found}; check the model's weights and its dtype")
    return best


def _highest(scaled: _Scores, k: int) -> _Ids:
    """Ids of the k highest, ascending; of equals at the border the lowest ids."""
    if not 0 < k < len(scaled):
        return np.arange(len(scaled))
    border = np.partition(scaled, len(scaled) - k)[len(scaled) - k]
    above = np.flatnonzero(scaled > border)
    level = np.flatnonzero(scaled == border)
    return np.sort(np.concatenate((above, level[: k - len(above)])))


def _nucleus(scaled: _Scores, ids: _Ids, p: float) -> _Ids:
    """The fewest of `ids` that hold the share p of their probability, ascending; of equals the lowest ids first."""
    if p == 1:
        return ids
    weights = np.exp(scaled[ids])
    total = float(weights.sum())
    # All entries below this weight together hold less than 1 - p: they need not be sorted, and mostly they are many.
    worth = np.flatnonzero(weights >= (1 - p) * total / len(ids))
    order = worth[np.argsort(-scaled[ids[worth]], kind="stable")]
    last = int(np.searchsorted(np.cumsum(weights[order]), p * total))
    return np.sort(ids[order[: last + 1]])


def _slack(scaled: _Scores, candidates: _Ids, ids: _Ids, p: float) -> tuple[float, float]:
    """How far the nucleus `ids` is from needing one token more, and from needing one less.

    As log-odds of the probability it holds: moving every logit by up to e moves them by up to 2e, like a score's gap.
    """
    if p == 1:
        return math.inf, math.inf
    share = math.log(p) - math.log1p(-p)
    out = float(np.exp(scaled[np.setdiff1d(candidates, ids)]).sum())
    weights = np.sort(np.exp(scaled[ids]))
    return _log(weights.sum()) - _log(out) - share, share - _log(weights[1:].sum()) + _log(out + weights[0])


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf
