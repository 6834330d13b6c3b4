"""What settings of KNN-LM come to on a text, against the language model alone, and those of least perplexity."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from .perplexity import Evidence, Floats, Text, bits_per_byte, mix, perplexity

_BLOCKS, _T = 50, 2.01  # blocks of neighbouring positions, and Student's t for their 95 % interval
_TINY = 1e-200  # stands for a probability of 0 where one is divided by
_STEPS, _WIDEST = 6, 40  # doublings of the temperature, either way: tried at first, and at most
_GOLDEN = (5**0.5 - 1) / 2


class Mixture(BaseModel):
    """KNN-LM with these settings on the text."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    top_k: int = Field(ge=1)
    interpolation: float = Field(ge=0, le=1)
    temperature: float = Field(gt=0)
    neighbours: float
    """How many of `top_k` a search brought, on average; an approximate one may bring fewer."""
    perplexity: float
    bits_per_byte: float
    ratio: float
    """Perplexity over that of the model alone, on the same positions."""
    ratio_low: float
    """95 % interval of `ratio`, from the differences of log p in blocks of neighbouring positions."""
    ratio_high: float


class Perplexities(BaseModel):
    """What `knn tune --json` and `knn perplexity --json` write."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    environment: dict[str, Any]
    perplexity: float
    """Of the model alone, per token."""
    bits_per_byte: float
    mixtures: list[Mixture]

    @property
    def best(self) -> Mixture:
        """The one of least perplexity."""
        return min(self.mixtures, key=lambda mixture: mixture.perplexity)


def tuned(evidence: Evidence, top_k: int) -> tuple[float, float]:
    """The λ and T of least perplexity for the `top_k` nearest, to three digits.

    For each T the best λ is known, as log p is concave in λ. T is looked for from the median distance in doublings and
    halvings, as far as they change anything, and then by golden sections on either side of the best of these.
    """
    p_lm, scale = np.exp(evidence.log_p), _scale(evidence.scores[:, :top_k])
    tried: dict[float, tuple[float, float, float]] = {}

    def loss(doublings: float) -> float:
        if doublings not in tried:
            temperature = float(f"{scale * 2.0**doublings:.3g}")
            p_knn = evidence.p_knn(top_k, temperature)
            share = _best_share(p_knn, p_lm)
            tried[doublings] = -float(mix(share, p_knn, p_lm).mean()), share, temperature
        return tried[doublings][0]

    low, high = (-_STEPS, _STEPS) if top_k > 1 else (0, 0)  # one neighbour has all the weight, whatever the temperature
    best = min(range(low, high + 1), key=loss)
    while low < high and best in (low, high) and abs(best) < _WIDEST:
        outward = 1 if best == high else -1
        if loss(best - outward) - loss(best) < 1e-6:
            break  # it goes on and on like this
        low, high = min(low, best + outward), max(high, best + outward)
        best = min((best, best + outward), key=loss)
    left, right = float(max(low, best - 1)), float(min(high, best + 1))
    for _ in range(8 if low < high else 0):
        inner = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
        left, right = (left, inner[1]) if loss(inner[0]) <= loss(inner[1]) else (inner[0], right)
    _, share, temperature = min(tried.values())
    return share, temperature


def mixture(evidence: Evidence, text: Text, *, top_k: int, interpolation: float, temperature: float) -> Mixture:
    """What KNN-LM with these settings makes of the positions."""
    mixed = evidence.mixed(top_k, interpolation, temperature)
    low, middle, high = _interval(mixed - evidence.log_p)
    return Mixture(
        top_k=top_k,
        interpolation=interpolation,
        temperature=temperature,
        neighbours=evidence.brought(top_k),
        perplexity=perplexity(mixed),
        bits_per_byte=bits_per_byte(mixed, text),
        ratio=math.exp(-middle),
        ratio_low=math.exp(-high),
        ratio_high=math.exp(-low),
    )


def _best_share(p_knn: Floats, p_lm: Floats) -> float:
    """The λ of least perplexity, to three decimals; 1 only where no token is without a right neighbour."""
    gain = p_knn - p_lm

    def slope(share: float) -> float:
        return float((gain / np.maximum(share * p_knn + (1 - share) * p_lm, _TINY)).mean())

    if slope(0.0) <= 0 or slope(1.0) >= 0:
        return 0.0 if slope(0.0) <= 0 else 1.0
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return min(round(low, 3), 0.999)


def _scale(scores: NDArray[np.float32]) -> float:
    """The median distance, of those above 0."""
    distances = -scores[np.isfinite(scores) & (scores < 0)]
    return float(np.median(distances)) if len(distances) else 1.0


def _interval(gained: Floats) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval around it: blocks are taken for independent, not positions."""
    mean = float(gained.mean())
    if not math.isfinite(mean):
        return mean, mean, mean
    blocks = [float(block.mean()) for block in np.array_split(gained, _BLOCKS)]
    half = _T * float(np.std(blocks, ddof=1)) / _BLOCKS**0.5
    return mean - half, mean, mean + half
