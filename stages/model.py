"""What a language model promises: a token prefix in, what it thinks of the next token out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefix:
    """All tokens before the one that is asked for: prompt and generated text, and what the workload puts before them.

    `tokens` int64 [n], n ≥ 1. `session` only tells the model whose KV memory may be reused. The last `proposed` tokens
    are a proposal: what the model would have said in the place of each is wanted too. 0 ≤ proposed < n.
    """

    session: int
    tokens: Tokens
    proposed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """What the model knows at the end of a prefix.

    `logits` float32 or float64 [vocabulary] of the next token. `key`, where the model has one, is float32
    [key_dimension]: its hidden state at the prefix's last token as it enters the last feed-forward layer. The same
    prefix gives the same key up to the model's rounding, so it can be looked up in a datastore of such states.
    `proposed`, where the prefix proposed p tokens, are the logits in the place of each of them, [p, vocabulary]: row i
    is what came after the tokens before the i-th proposed one. None where none were proposed.
    """

    logits: NDArray[np.floating[Any]]
    key: NDArray[np.float32] | None = None
    proposed: NDArray[np.floating[Any]] | None = None


class LanguageModel(Protocol):
    """A decoder. `forward` runs in one worker thread; everything else is cheap, thread-safe and may run on the loop.

    KV memory is the model's private optimisation. It reuses the longest prefix it still holds for the session, so a
    rollback needs no call, and an unchanged document costs no prefill.
    """

    @property
    def context_length(self) -> int:
        """The longest prefix, in tokens, that `forward` accepts."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        ...

    @property
    def start_tokens(self) -> tuple[int, ...]:
        """Tokens that every prefix should begin with (the tokenizer's own beginning of sequence, often none)."""
        ...

    @property
    def max_batch(self) -> int:
        """How many sessions one `forward` call decodes together."""
        ...

    @property
    def kv_tokens(self) -> int:
        """How many prefix tokens there is KV memory for, over all sessions; `context_length` or more."""
        ...

    def encode(self, text: str) -> list[int]:
        """Text to tokens, with no special tokens added and none parsed out of the text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens to text, special tokens left out."""
        ...

    def forward(self, prefixes: Sequence[Prefix]) -> Sequence[Frontier | Exception | None]:
        """One forward pass for up to `max_batch` sessions. For each prefix, in order: its frontier; or None where only
        a part of it was read so far, so ask again; or the fault of this one session. What is raised is all sessions'.
        Every proposal is answered.
        """
        ...

    def forget(self, session: int) -> None:
        """Free what is kept for a session; called when no `forward` for it is running or will come."""
        ...


@runtime_checkable
class TellsStates(Protocol):
    """What a workload that asks with hidden states needs of a model beside `LanguageModel`."""

    @property
    def key_dimension(self) -> int:
        """Width of a frontier's key."""
        ...

    def fingerprint(self) -> str:
        """A checksum of the model and its tokenizer: keys of models with the same one may be compared. Blocking."""
        ...


def token_by_token(prefix: Prefix, know: Callable[[Tokens], Frontier]) -> Frontier:
    """A frontier with its proposal answered, for a model that `know`s the frontiers of single prefixes."""
    frontier = know(prefix.tokens)
    if not prefix.proposed:
        return frontier
    n = len(prefix.tokens)
    places = [know(prefix.tokens[:end]).logits for end in range(n - prefix.proposed, n)]
    return replace(frontier, proposed=np.stack(places))


def read_to_end(model: LanguageModel, prefix: Prefix) -> Frontier:
    """The frontier of one prefix, in as many passes as it takes. Blocking; raises what `forward` raises or returns."""
    while True:
        (outcome,) = model.forward([prefix])
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is not None:
            return outcome
