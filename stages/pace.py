"""What a session's stride scheduler learns from, until there is no doubt about any of it."""

from .stride import Stride


class Pace:
    """Gathers, since the stride scheduler last learned, what steps took and which guesses stood."""

    def __init__(self, stride: Stride) -> None:
        self.stride = stride
        self._steps_s: list[float] = []
        self._stood: list[bool] = []
        self._verification_s = 0.0

    def completed(self, step_s: float) -> None:
        """A step has got all its tokens."""
        self._steps_s.append(step_s)

    def judged(self, stands: bool) -> None:
        """Whether the tokens written under a guess stand, in step order."""
        self._stood.append(stands)

    def verified(self, verification_s: float) -> None:
        """Verdicts have come, so long after their launch."""
        self._verification_s = verification_s

    def learn(self) -> None:
        """Show the scheduler what has been gathered, if any guess was judged."""
        if not self._stood:
            return
        mean = sum(self._steps_s) / len(self._steps_s) if self._steps_s else None
        matched, checked = sum(self._stood), len(self._stood)
        self.stride.observe(matched=matched, checked=checked, step_s=mean, verification_s=self._verification_s)
        self._steps_s.clear()
        self._stood.clear()
