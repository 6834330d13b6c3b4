"""Cuts a session into stretches of steps, so that what each took can be told apart."""

from dataclasses import replace

from .statistics import Statistics

STEPS = 16
"""Of a stretch, at least: it ends with a commit, which may be of many steps at once."""


class Stretches:
    """What a session took, stretch by stretch; every step of one was begun in the same arrangement.

    The first step is left out, since it waits for the first search. So are the steps that were begun before the
    arrangement changed, and the first one after that, with the time until they are committed. Where too few steps are
    left for another, a stretch goes on to the end, so that the last verification counts.
    """

    def __init__(self) -> None:
        self._first = 1  # steps that must be committed before a stretch begins
        self._begun: Statistics | None = None  # as they stood when it began
        self._told = False  # whether any stretch has been complete

    def committed(self, so_far: Statistics, left: int) -> Statistics | None:
        """More steps are committed, and so many are still to be begun: what the stretch took, if this ends it."""
        if self._begun is None:
            if so_far.steps >= self._first:
                self._begun = so_far
            return None
        taken = so_far.since(self._begun)
        if taken.steps < STEPS or left < STEPS // 2:
            return None
        self._begun, self._told = so_far, True
        return taken

    def restart(self, steps_begun: int) -> None:
        """From here on the session is served otherwise."""
        self._first, self._begun = steps_begun + 1, None

    def rest(self, in_all: Statistics, *, cut_short: bool) -> Statistics | None:
        """What the last steps of a session took that has ended, if they are half a stretch at least; if no stretch was
        ever complete, all of them.

        One that was `cut_short`, since it took too long, tells of fewer as well, and be it of none.
        """
        if self._begun is not None:
            taken = in_all.since(self._begun)
            if taken.steps >= STEPS // 2 or (cut_short and self._told):
                return taken
        elif cut_short and self._told:
            return replace(in_all, steps=0)
        return None if self._told else in_all
