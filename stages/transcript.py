"""What a session has written: the context, and the steps in it that are not committed yet."""

from collections import deque
from collections.abc import Sequence

from .model import Frontier
from .step import Step


class Transcript:
    """The prompt and every token behind it, committed or drafted, cut into steps.

    It only keeps count, and does not know why: `Session` decides what is written, taken back and committed.
    """

    __slots__ = ("begun", "committed", "context", "ended", "frontier", "steps", "_prompt", "_retrieval_stride")

    def __init__(self, prompt: Sequence[int], retrieval_stride: int) -> None:
        self.context = list(prompt)
        self.committed: list[int] = []
        self.steps: deque[Step] = deque()  # uncommitted, oldest first
        self.begun = 0  # steps, committed ones included; also the index of the next one
        self.ended = False  # nothing is left to decode, if every draft stands
        self.frontier: Frontier | None = None  # at the end of the context, where queries need it
        self._prompt = len(prompt)
        self._retrieval_stride = retrieval_stride

    @property
    def generated(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.context[self._prompt :]

    @property
    def position(self) -> int:
        """How many they are."""
        return len(self.context) - self._prompt

    @property
    def open_step(self) -> Step | None:
        """The newest step, as long as it has not got all its tokens."""
        return self.steps[-1] if self.steps and not self.steps[-1].complete else None

    @property
    def doubted(self) -> Step | None:
        """The step in doubt. It is the oldest: those before it have been committed, and later verdicts wait for it."""
        return self.steps[0] if self.steps and self.steps[0].doubted else None

    @property
    def unsettled(self) -> Step | None:
        """The oldest step that is not settled: it waits for its verdict, or for the model's word on its doubt. One that
        is certified waits for neither: `Session._settle` passes it."""
        return next((step for step in self.steps if not step.settled), None)

    @property
    def finished(self) -> bool:
        """Whether the output is complete and all of it committed."""
        return self.ended and not self.steps

    def before(self, step: Step) -> list[int]:
        """The context that `step` was begun with."""
        return self.context[: self._prompt + step.start]

    def begin(self, step: Step) -> None:
        """`step` is the newest now."""
        self.steps.append(step)
        self.begun += 1

    def write(self, step: Step, token: int, *, ends: bool) -> None:
        """The newest step gets its next token; whether that ends the output is provisional while it is a draft."""
        step.tokens.append(token)
        self.context.append(token)
        step.complete = ends or len(step.tokens) == self._retrieval_stride
        self.ended = ends

    def cut(self, step: Step, keep: int) -> int:
        """Back to the first `keep` tokens of `step`, as if nothing had come after them; the tokens that go."""
        end = self._prompt + step.start + keep
        dropped = len(self.context) - end
        del self.context[end:]
        while self.steps[-1] is not step:
            self.steps.pop()
        del step.tokens[keep:]
        self.frontier = step.frontier
        self.begun = step.index + 1
        self.ended = step.complete = False
        return dropped

    def commit(self) -> Step | None:
        """The oldest step, committed, if it is settled and complete."""
        if not self.steps or not self.steps[0].settled or not self.steps[0].complete:
            return None
        step = self.steps.popleft()
        self.committed += step.tokens
        return step
