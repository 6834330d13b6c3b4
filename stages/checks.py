"""A session's checks: those that wait, those that fly, and verdicts that have come before the ones of earlier steps."""

from collections import deque
from dataclasses import dataclass, field

from .messages import Check, Verdict


@dataclass(slots=True, eq=False)
class Checks:
    """At most `window` checks fly at once, stale ones included: each has a credit, which returns with its turn (R5)."""

    window: int
    queued: deque[Check] = field(default_factory=deque)  # of steps that wait for them, so there are steps if any are
    flying: list[tuple[Check, ...]] = field(default_factory=list)  # a batch for each turn that is out at Verify
    verdicts: dict[int, Verdict] = field(default_factory=dict)  # by step; of this epoch, not applied yet

    @property
    def credits_out(self) -> int:
        """How many checks fly."""
        return sum(len(batch) for batch in self.flying)

    def flies(self, step: int, epoch: int) -> bool:
        """Whether the check of this step, as it stands, is on its way."""
        return any(check.step == step and check.epoch == epoch for batch in self.flying for check in batch)

    def launch(self) -> tuple[Check, ...]:
        """What waits leaves, oldest first, as far as there are credits; from now on it flies."""
        number = min(len(self.queued), self.window - self.credits_out)
        batch = tuple(self.queued.popleft() for _ in range(number))
        self.flying.append(batch)
        return batch

    def land(self, batch: tuple[Check, ...]) -> None:
        """The turn of these is home: their credits return."""
        self.flying.remove(batch)

    def drop(self) -> None:
        """Forget what waits to fly or to be applied; what flies comes home in its own time."""
        self.queued.clear()
        self.verdicts.clear()
