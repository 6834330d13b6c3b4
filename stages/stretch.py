"""Cuts a session into stretches of steps, so that what each took can be told apart."""

from .statistics import Statistics

STEPS = 16
"""Of a stretch, at least: it ends with a commit, which may be of many steps at once."""


class Stretches:
    """What a session took, stretch by stretch; every step of one was begun in the same arrangement.

    The first step is left out, since it waits for the first search, and so are those that were begun before the
    arrangement changed, with the time until they are committed.
    """

    def __init__(self) -> None:
        self._first = 1  # steps that must be committed before a stretch begins
        self._begun: Statistics | None = None  # as they stood when it began
        self._told = False  # whether any stretch has been complete

    def committed(self, so_far: Statistics) -> Statistics | None:
        """More steps are committed: what the stretch took, if that makes it complete."""
        if self._begun is None:
            if so_far.steps >= self._first:
                self._begun = so_far
            return None
        taken = so_far.since(self._begun)
        if taken.steps < STEPS:
            return None
        self._begun, self._told = so_far, True
        return taken

    def restart(self, steps_begun: int, so_far: Statistics) -> None:
        """From here on the session is served otherwise: the next stretch begins when all `steps_begun` are committed,
        at once if they are."""
        self._first, self._begun = steps_begun, None
        self.committed(so_far)

    def rest(self, in_all: Statistics) -> Statistics | None:
        """What the last steps of a session took that has ended, if they are half a stretch at least; if no stretch was
        ever complete, all of them."""
        if self._begun is not None:
            taken = in_all.since(self._begun)
            if taken.steps >= STEPS // 2:
                return taken
        return None if self._told else in_all
