"""What a caller asked for, and how far it has come."""

from dataclasses import dataclass
from enum import Enum

from .sampling import Sampling


class Status(Enum):
    """How a session stands; everything but LIVE is final."""

    LIVE = "live"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Fixed at admission. `prompt` are tokens; `deadline` is a point of the event loop's clock, in seconds."""

    prompt: tuple[int, ...]
    prompt_tokens_cut: int = 0
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    end_tokens: frozenset[int] = frozenset()
    drafts: bool = False
    trace: bool = False
    deadline: float = float("inf")
    unread_limit: int = 64
    """Events that may wait for the caller before the session begins no new work."""

    def ends(self, token: int, position: int) -> bool:
        """Whether the output ends with this token, the generated one at `position` (from 0)."""
        return token in self.end_tokens or position + 1 == self.max_new_tokens
