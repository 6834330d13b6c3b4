"""How far to speculate before asking: a fixed stride, the paper's scheduler OS3 (paper, section 3), or an even pace."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Stride(Protocol):
    """Chooses one session's speculation stride, online."""

    @property
    def length(self) -> int:
        """How many checks must wait for a batch of them to go to the knowledge base; those that wait go together."""
        ...

    def observe(self, *, matched: int, checked: int, step_s: float | None, verification_s: float) -> None:
        """Learn from one verification: guesses matched of those checked, the mean time of the steps decoded for it
        (None where there was none), and its own time, in seconds."""
        ...


class StrideSettings(Protocol):
    """Makes the stride scheduler of a session."""

    @property
    def longest(self) -> int:
        """The largest stride it can ever choose."""
        ...

    def start(self, *, asynchronous: bool) -> Stride:
        """A scheduler for one session, knowing whether verification overlaps decoding."""
        ...


@dataclass(frozen=True, slots=True)
class FixedStride:
    """Always the same stride; the paper's runs without the scheduler use 3."""

    length: int = 3

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"FixedStride({self.length}): a stride is at least 1")

    @property
    def longest(self) -> int:
        """The stride itself."""
        return self.length

    def start(self, *, asynchronous: bool) -> "FixedStride":
        """Itself: it learns nothing."""
        return self

    def observe(self, *, matched: int, checked: int, step_s: float | None, verification_s: float) -> None:
        """Nothing to learn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OS3:
    """Optimal speculation stride scheduler, with the paper's estimators as defaults.

    `window` verifications are used to estimate γ, which is cut at `gamma_max`. The stride starts at 1 and changes first
    after two verifications. `longest` bounds it (with γ ≤ 0.6 a stride of 8 is optimal only from b/a ≈ 80 on).
    """

    window: int = 5
    gamma_max: float = 0.6
    longest: int = 16

    def __post_init__(self) -> None:
        if self.window < 1 or self.longest < 1 or not 0 < self.gamma_max < 1:
            raise ValueError(f"{self}: window and longest are at least 1, gamma_max lies between 0 and 1")

    def start(self, *, asynchronous: bool) -> "OS3Stride":
        """A scheduler for one session."""
        return OS3Stride(self, asynchronous_objective if asynchronous else synchronous_objective)


class OS3Stride:
    """OS3 for one session. a and b are the last measured ones, γ the maximum-likelihood estimate over the window."""

    def __init__(self, settings: OS3, objective: Callable[[int, float, float, float], float]) -> None:
        self.length = 1
        self._settings = settings
        self._objective = objective
        self._seen: deque[tuple[int, bool]] = deque(maxlen=settings.window)
        self._verifications = 0
        self._step_s: float | None = None

    @property
    def gamma(self) -> float:
        """γ̂ = ΣM / (ΣM + Σ1[M < s]), cut at `gamma_max`."""
        matched = sum(m for m, _ in self._seen)
        missed = sum(miss for _, miss in self._seen)
        return min(matched / (matched + missed), self._settings.gamma_max)

    def observe(self, *, matched: int, checked: int, step_s: float | None, verification_s: float) -> None:
        """Take in one verification, then climb from 1 while the objective does not fall."""
        self._seen.append((matched, matched < checked))
        self._verifications += 1
        self._step_s = step_s if step_s is not None else self._step_s
        if self._verifications < 2 or self._step_s is None:
            return

        def worth(stride: int) -> float:
            return self._objective(stride, self.gamma, self._step_s or 0.0, verification_s)

        stride = 1
        while stride < self._settings.longest and worth(stride + 1) >= worth(stride):
            stride += 1
        self.length = stride


class PacedStride:
    """Spreads `flights` verifications evenly over the time that one of them takes: ceil(b / (a · flights)) checks each.

    Of use with more than one flight: a single one leaves with whatever waits. Bounded by `longest`. a and b are the
    last measured ones; until there are any, every check is worth a flight.
    """

    def __init__(self, flights: int, longest: int) -> None:
        self.length = 1
        self._flights = flights
        self._longest = longest

    def observe(self, *, matched: int, checked: int, step_s: float | None, verification_s: float) -> None:
        """Learn a and b."""
        if step_s:
            self.length = min(max(1, math.ceil(verification_s / step_s / self._flights)), self._longest)


def expected_advance(stride: int, gamma: float) -> float:
    """Steps a round advances on average: (1 − γ^s) / (1 − γ)."""
    return (1 - gamma**stride) / (1 - gamma)


def synchronous_objective(stride: int, gamma: float, a: float, b: float) -> float:
    """Verified steps per second when decoding waits for each verification."""
    return expected_advance(stride, gamma) / max(stride * a + b, 1e-12)


def asynchronous_objective(stride: int, gamma: float, a: float, b: float) -> float:
    """Verified steps per second when one more step decodes while the verification runs."""
    hit = gamma**stride
    seconds = hit * ((stride - 1) * a + max(a, b)) + (1 - hit) * (stride * a + b)
    return expected_advance(stride, gamma) / max(seconds, 1e-12)
