"""Quantiles of any number of measurements, in memory that does not grow with them."""

import math
from collections import Counter

_WIDTH = math.log(1.01)


class Quantiles:
    """Measurements counted in buckets 1 % wide, so a quantile is right to half a per cent.

    Where the growth of memory is measured, what measures must not grow itself. Values are at least 0; those below a
    microsecond, if they are seconds, count as one.
    """

    def __init__(self) -> None:
        self.count = 0
        self._buckets: Counter[int] = Counter()

    def add(self, value: float) -> None:
        """One more measurement."""
        self.count += 1
        self._buckets[math.ceil(math.log(max(value, 1e-6)) / _WIDTH)] += 1

    def at(self, share: float) -> float | None:
        """The smallest value that at least this share of the measurements does not exceed; None without any."""
        left = share * self.count
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return math.exp((bucket - 0.5) * _WIDTH)
        return None
