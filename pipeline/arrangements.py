"""Sequential, synchronous, asynchronous and continuous serving: the same stages, four sets of two decisions.

In the first three, a round decodes one step under a document known to be right and drafts more under guesses. After
each step the query of the next one is formed, so a batch of s checks covers the documents of steps 2 … s + 1 (paper,
section 2). Continuous serving has no rounds.

                     may a guessed step be decoded?                  when do queued checks go out?
    Sequential       never                                           at once
    Synchronous      while nothing is being verified                 s are queued, or nothing else can be done
    Asynchronous     the same, and beside the verification           the same
                     the one step whose own check is in it
    Continuous       always, up to the window                       a flight is free and nothing flies, or enough of
                                                                     them wait, or nothing else can be done
"""

from dataclasses import dataclass, field

from ralmspec.stages.arrangement import Outlook
from ralmspec.stages.stride import OS3, FixedStride, PacedStride, Stride, StrideSettings


@dataclass(frozen=True, slots=True)
class Sequential:
    """RaLMSeq, the baseline and the oracle: retrieve, decode, retrieve, decode."""

    guesses = False
    asks_drafter = False
    token_check = False
    certified_skip = False
    prefetch = 1
    window = 1
    flights = 1

    def stride(self) -> Stride:
        """One check at a time."""
        return FixedStride(1)

    def may_draft(self, outlook: Outlook) -> bool:
        """Never: there are no guesses."""
        return False

    def checks_due(self, outlook: Outlook) -> bool:
        """At once."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Synchronous:
    """RaLMSpec: decode a stride under guesses, then wait for the verification of all of it."""

    speculation_stride: StrideSettings | int = field(default_factory=OS3)
    prefetch: int = 20
    token_check: bool = False
    certified_skip: bool = False
    asks_drafter: bool = True
    guesses = True
    flights = 1

    def __post_init__(self) -> None:
        if self.prefetch < 1:
            raise ValueError(f"prefetch={self.prefetch}: a search brings at least 1 document")
        self._settings()  # a number that is no stride is refused here

    def _settings(self) -> StrideSettings:
        stride = self.speculation_stride
        return FixedStride(stride) if isinstance(stride, int) else stride

    @property
    def window(self) -> int:
        """A stride of drafts, and the step whose check closes the batch. Certified steps take up room as well, so a
        batch may leave with fewer checks."""
        return self._settings().longest + 1

    def stride(self) -> Stride:
        """A scheduler that knows that verification does not overlap."""
        return self._settings().start(asynchronous=False)

    def may_draft(self, outlook: Outlook) -> bool:
        """While nothing is being verified."""
        return not outlook.flying

    def checks_due(self, outlook: Outlook) -> bool:
        """When the stride is full, or when only verdicts can bring the session on."""
        return outlook.stuck or outlook.queued >= outlook.stride


@dataclass(frozen=True, slots=True, kw_only=True)
class Asynchronous(Synchronous):
    """RaLMSpec with asynchronous verification: one more step decodes while a batch is being verified."""

    def stride(self) -> Stride:
        """A scheduler that knows that verification overlaps."""
        return self._settings().start(asynchronous=True)

    def may_draft(self, outlook: Outlook) -> bool:
        """Also beside a verification, if it is this step's own."""
        return not outlook.flying or outlook.newest_flying


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuous:
    """Decoding never waits: it drafts on while up to `flights` batches of checks are being verified.

    `window` bounds how far, in steps. It should cover the time from a check's launch to its verdict, b / a steps, and
    the time it waits for its launch: twice that with one flight, where whatever waits leaves as soon as that is free.
    More flights than the retriever serves at once (`concurrency`) only split what could be one batch. Where queries are
    made from frontiers, every open step keeps its own: a row of logits. Best where guesses are mostly right and the
    index has resources of its own; one that changes a token wastes all that was drafted after it.
    """

    window: int = 64
    flights: int = 1
    prefetch: int = 20
    token_check: bool = True
    certified_skip: bool = True
    asks_drafter: bool = True
    guesses = True

    def __post_init__(self) -> None:
        for name in ("window", "flights", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"Continuous({name}={getattr(self, name)}): must be at least 1")

    def stride(self) -> Stride:
        """As many checks a flight as keep the flights evenly spread."""
        return PacedStride(self.flights, self.window)

    def may_draft(self, outlook: Outlook) -> bool:
        """Always; the window is the bound."""
        return True

    def checks_due(self, outlook: Outlook) -> bool:
        """When nothing flies, when enough wait, or when only verdicts can bring the session on."""
        return not outlook.flying or outlook.stuck or outlook.queued >= outlook.stride
