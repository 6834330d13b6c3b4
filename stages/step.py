"""One retrieval and the tokens decoded under it."""

from dataclasses import dataclass, field
from enum import Enum

from ralmspec.retrievers.base import Ranking

from .model import Frontier


class Move(Enum):
    """What a session's next turn is for: to begin a step, or for a forward pass (the next token of the newest step, the
    token check of the oldest, or the frontier)."""

    LOOK = "look"
    DECODE = "decode"


@dataclass(slots=True, kw_only=True, eq=False)
class Step:
    """Uncommitted as long as it stands in `Transcript.steps`.

    `start` counts generated tokens before it. `retrieved` is a guess until the step is `certain`, `from_drafter` or
    from the cache, and None while nothing is known at all. `frontier` is that at its start, where queries need one.
    It is `certified` when its guess is proven to be right for this context, and then it has no check. It is `complete`
    when it has all its tokens. It is `barred` when it could not be decoded under its guess: whether that is an error
    shows once it is certain, and is decoded again. It is `doubted` when its tokens were written under other
    documents than the true ones, and the model has not yet said under those whether it would have written the same.
    It commits when it is certain, complete and free of doubt. `busy_s` is the time it has spent in Lookup and
    Generate, waiting for its turn included, since it was last rolled back.

        guessed and certified, all before it settled    certain
        guessed, verdict right                          certain
        guessed, verdict wrong                          certain and doubted; `retrieved` is the truth now
            the model says the same under it            certain
            it says otherwise                           ROLLBACK to the first other token, certain
        the same without token check, or no token yet   ROLLBACK to its start, certain
        never guessed, verdict here                     certain, nothing written yet
    """

    index: int
    start: int
    retrieved: Ranking | None
    from_drafter: bool = False
    certified: bool = False
    frontier: Frontier | None = None
    certain: bool = False
    complete: bool = False
    barred: bool = False
    doubted: bool = False
    busy_s: float = 0.0
    tokens: list[int] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        """Whether its documents are known, and its tokens, as far as there are any, are written under them."""
        return self.certain and not self.doubted
