"""One retrieval and the tokens decoded under it."""

from dataclasses import dataclass, field
from enum import Enum

from ralmspec.retrievers.base import Ranking

from .model import Frontier


class Move(Enum):
    """What a session's next turn is for: to begin a step, or to decode a token of the newest one."""

    LOOK = "look"
    DECODE = "decode"


@dataclass(slots=True, kw_only=True, eq=False)
class Step:
    """Uncommitted as long as it stands in `Session.steps`.

    `start` counts generated tokens before it. `retrieved` is a guess until the step is `certain`, and None while
    nothing is known at all. `frontier` is that at its start, where queries need one. The step is `complete` when it has
    all its tokens, and commits when it is certain and complete. It is `barred` when it could not be decoded under its
    guess: whether that is an error, only the verdict tells. `busy_s` is the time it has spent in Lookup and
    Generate, waiting for its turn included.
    """

    index: int
    start: int
    retrieved: Ranking | None
    frontier: Frontier | None = None
    certain: bool = False
    complete: bool = False
    barred: bool = False
    busy_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
