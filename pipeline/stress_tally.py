"""What became of the clients of a stress run: counts and times, in memory that does not grow with them."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from ralmspec.stages.messages import Committed
from ralmspec.stages.statistics import Statistics

from .quantiles import Quantiles
from .stress_oracle import Mismatch


class Fate(Enum):
    """How a client's visit ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(slots=True)
class Seen:
    """What one client got to see, and when, by `perf_counter`. It arrived before it was first refused, if it was."""

    arrived: float
    steps: list[Committed] = field(default_factory=list)
    tokens: int = 0
    first_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0

    def take(self, step: Committed, now: float) -> None:
        """One more committed step."""
        if not self.steps:
            self.first_tokens, self.first_s = len(step.tokens), now
        self.last_s = now
        self.tokens += len(step.tokens)
        self.steps.append(step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One client's end. Seconds: `arrived` by `perf_counter`; times to the first token and to the end from there."""

    fate: Fate
    why: str
    arrived: float
    ttft_s: float | None
    e2e_s: float
    kept_slo: bool


@dataclass(slots=True, kw_only=True)
class Tally:
    """Everything that is counted while clients come and go. `told` hears of every end."""

    slo_ttft_s: float
    slo_e2e_s: float
    told: Callable[[Ended], None] = lambda ended: None
    fates: Counter[Fate] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    last_failed: dict[str, float] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    mismatches: list[Mismatch] = field(default_factory=list)
    checked: int = 0
    kept_slo: int = 0
    tokens: int = 0
    rollbacks: int = 0
    wasted_tokens: int = 0
    refusals: int = 0
    retries: int = 0
    ttft: Quantiles = field(default_factory=Quantiles)
    token: Quantiles = field(default_factory=Quantiles)
    e2e: Quantiles = field(default_factory=Quantiles)
    refusal: Quantiles = field(default_factory=Quantiles)
    lag: Quantiles = field(default_factory=Quantiles)
    _usual: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    @property
    def ended(self) -> int:
        """Clients that have gone."""
        return self.fates.total()

    @property
    def usual_s(self) -> float:
        """What a completed visit has taken lately, in seconds."""
        return sum(self._usual) / len(self._usual) if self._usual else 0.1

    def took(self, statistics: Statistics) -> None:
        """What a session cost, however it ended."""
        self.rollbacks += statistics.rollbacks
        self.wasted_tokens += statistics.wasted_tokens

    def refused(self, seconds: float) -> None:
        """An `Overloaded`, after so long."""
        self.refusals += 1
        self.refusal.add(seconds)

    def end(self, fate: Fate, why: str, seen: Seen, mismatch: Mismatch | None, now: float) -> None:
        """A client goes; `why` names the error of one that failed or was lost."""
        self.fates[fate] += 1
        self.checked += seen.tokens > 0 or mismatch is not None
        e2e_s, ttft_s = now - seen.arrived, seen.first_s - seen.arrived if seen.steps else None
        kept_slo = False
        if mismatch is not None:
            self.mismatches.append(mismatch)
        if fate is Fate.FAILED:
            self.failed[why] += 1
            self.last_failed[why] = now
        elif fate is Fate.LOST:
            self.lost[why] += 1
        elif fate is Fate.COMPLETED and ttft_s is not None:
            self.ttft.add(ttft_s)
            self.e2e.add(e2e_s)
            self._usual.append(e2e_s)
            if seen.tokens > seen.first_tokens:
                self.token.add((seen.last_s - seen.first_s) / (seen.tokens - seen.first_tokens))
            kept_slo = ttft_s <= self.slo_ttft_s and e2e_s <= self.slo_e2e_s
            self.kept_slo += kept_slo
        self.told(Ended(fate=fate, why=why, arrived=seen.arrived, ttft_s=ttft_s, e2e_s=e2e_s, kept_slo=kept_slo))
