"""What the clients of a stress run ask for, and how they behave."""

import random
from dataclasses import dataclass
from enum import Enum

from .engine import Engine

_MIX = ("short", "short", "passage", "short", "short", "passage", "short", "short", "passage", "long")
"""Of ten prompts six are a question or a few words, three a whole passage, and one is four passages."""
_SHORT_WORDS = (6, 24)
_LONG_PASSAGES = 4


class GivesUp(Enum):
    """How a client that cancels does it."""

    LEAVES = "leaves the block after some steps"
    CANCELS = "calls cancel from another task after a while"
    IS_CANCELLED = "is itself cancelled after a while"


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One client. `after` is in [0, 1): when it gives up, as a share of an answer or of the usual time of one."""

    number: int
    prompt: int
    max_new_tokens: int
    gives_up: GivesUp | None
    after: float
    slow: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Client n is drawn from (seed, n) alone, so it is the same whatever happened before it came.

    A quarter, a half, or all of `max_new_tokens` are asked for, equally often.
    """

    prompts: int
    max_new_tokens: int
    cancel_rate: float = 0.0
    slow_reader_rate: float = 0.0
    seed: int = 0

    def visit(self, number: int) -> Visit:
        """The client with this number, from 0."""
        chance = random.Random(f"{self.seed} client {number}")
        return Visit(
            number=number,
            prompt=chance.randrange(self.prompts),
            max_new_tokens=max(1, self.max_new_tokens // chance.choice((1, 2, 4))),
            gives_up=chance.choice([*GivesUp]) if chance.random() < self.cancel_rate else None,
            after=chance.random(),
            slow=chance.random() < self.slow_reader_rate,
        )


def mixed_prompts(engine: Engine, count: int, seed: int) -> list[str]:
    """So many prompts of mixed lengths: questions, where the engine has some, and stretches of its passages."""
    chance = random.Random(f"{seed} prompts")
    questions = []
    if engine.questions is not None:
        questions = [question.question for name in engine.questions.sets() for question in engine.questions.read(name)]
        chance.shuffle(questions)

    def words(passages: int) -> list[str]:
        ids = [chance.randrange(len(engine.index)) for _ in range(passages)]
        return " ".join(engine.index.document(id).text for id in ids).split()

    def prompt(kind: str) -> str:
        if kind == "short":
            return questions.pop() if questions else " ".join(words(1)[: chance.randint(*_SHORT_WORDS)])
        return " ".join(words(1 if kind == "passage" else _LONG_PASSAGES))

    return [prompt(_MIX[number % len(_MIX)]) for number in range(count)]
