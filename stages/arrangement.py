"""What an arrangement decides: when a session may go on under a guess, and when its checks go out."""

from dataclasses import dataclass
from typing import Protocol

from .stride import Stride


@dataclass(frozen=True, slots=True)
class Outlook:
    """What an arrangement may look at.

    `queued` checks wait, `flying` ones have been launched and not come home (stale ones included); `newest_flying` says
    whether the newest step's own check, as it stands, is among those; `stuck` that nothing new can be decoded before
    a verdict (the newest step has no document, or could not be decoded under its guess, the output is complete, the
    window is full, or the model has no time for guesses); `stride` is the session's speculation stride.
    """

    queued: int
    flying: int
    newest_flying: bool
    stuck: bool
    stride: int


class Arrangement(Protocol):
    """One way to arrange the stages. Every arrangement gives the same output; they differ in time only."""

    @property
    def guesses(self) -> bool:
        """Whether Lookup guesses documents from the session's cache, and Verify fills it."""
        ...

    @property
    def prefetch(self) -> int:
        """Documents that every search brings (the paper's prefetch k; 1 is the answer alone)."""
        ...

    @property
    def window(self) -> int:
        """How many uncommitted steps a session may have. The largest one it may be given is K of R5: how many of its
        checks may be in flight."""
        ...

    @property
    def flights(self) -> int:
        """Batches of checks that a session may have in flight at once."""
        ...

    @property
    def asks_drafter(self) -> bool:
        """Whether Lookup also guesses with the drafter, where the pipeline has one."""
        ...

    @property
    def token_check(self) -> bool:
        """Whether tokens written under documents that turn out not to be the true ones are first put to the model under
        those: what it would have written too stands, and if that is all, everything drafted after it does."""
        ...

    @property
    def certified_skip(self) -> bool:
        """Whether a step goes without a check where an earlier search proves that its guess is right."""
        ...

    def stride(self) -> Stride:
        """The stride scheduler for a session that begins, or that is served so from now on."""
        ...

    def may_draft(self, outlook: Outlook) -> bool:
        """Whether the newest step may be decoded although its document is only a guess."""
        ...

    def checks_due(self, outlook: Outlook) -> bool:
        """Whether the queued checks go to the knowledge base now (there is one, a credit, and a flight to be had)."""
        ...
