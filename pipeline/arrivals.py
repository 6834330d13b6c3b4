"""When clients come: by a clock of their own, or as soon as another one has left."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

_BURSTY = 1 / 16
"""Shape of the gamma distribution of gaps: their standard deviation is four times their mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Clients come whether or not those before them have been served, which is what overload looks like.

    `phases` are (seconds, clients a second), one after the other; the seconds may be infinite. Gaps between clients are
    exponential (a Poisson process), or, if `bursty`, gamma-distributed with a standard deviation of four means.
    """

    phases: tuple[tuple[float, float], ...]
    bursty: bool = False

    def __post_init__(self) -> None:
        if not self.phases or not all(seconds > 0 and 0 < rate < math.inf for seconds, rate in self.phases):
            raise ValueError(f"phases={self.phases}: seconds and rates must be above 0, rates finite")

    def instants(self, seed: int) -> Iterator[float]:
        """Seconds after the beginning at which a client comes, ascending; they end with the last phase."""
        chance = random.Random(f"{seed} arrivals")
        now, left = 0.0, self._gap(chance)
        end = 0.0
        for seconds, rate in self.phases:
            end += seconds
            while left <= rate * (end - now):
                now += left / rate
                yield now
                left = self._gap(chance)
            left -= rate * (end - now)  # what is left of the gap passes at the next phase's rate
            now = end

    def _gap(self, chance: random.Random) -> float:
        """In units of the mean gap."""
        return chance.gammavariate(_BURSTY, 1 / _BURSTY) if self.bursty else chance.expovariate(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """So many clients at a time; who leaves is replaced at once, who is refused when told to come again."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency={self.concurrency}: must be at least 1")
