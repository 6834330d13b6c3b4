"""What a workload supplies: how to ask, what to condition on, how to choose a token, and when a guess was right.

No stage knows which workload it serves. The settings a user writes are a `Workload`; bound to a model and a knowledge
base they become a `BoundWorkload`, which the stages use.
"""

from collections.abc import Sequence
from typing import Protocol

from ralmspec.retrievers.base import Query, Ranking, Retriever

from .messages import Source
from .model import Frontier, LanguageModel, Tokens
from .sampling import Sampling


class BoundWorkload(Protocol):
    """A workload on one model and one knowledge base. Its methods are pure: same inputs, same answer."""

    @property
    def retrieval_stride(self) -> int:
        """Tokens per step."""
        ...

    @property
    def top_k(self) -> int:
        """Documents that condition a step."""
        ...

    def prompt(self, text: str) -> tuple[list[int], int]:
        """The prompt's tokens as they will be served, and how many were cut; runs on the loop.

        Raises `EmptyPrompt`, and `PromptTooLong` where cutting is refused.
        """
        ...

    def room(self) -> int:
        """The longest prefix, in tokens, that a session with no generated token can have."""
        ...

    def query(self, context: Sequence[int]) -> Query:
        """The next step's question, from prompt and generated tokens; runs on the loop."""
        ...

    def prefix(self, context: Sequence[int], retrieved: Ranking) -> Tokens:
        """What the model is to continue, int64 [n]; runs in the model's worker."""
        ...

    def choose(self, frontier: Frontier, retrieved: Ranking, position: int, sampling: Sampling) -> int:
        """The token at `position`, given what the model knows; runs in the model's worker."""
        ...

    def agree(self, guess: Ranking, truth: Ranking) -> bool:
        """Whether a step decoded under `guess` is what it would be under `truth`."""
        ...

    def source(self, retrieved: Ranking) -> Source:
        """The document a step is attributed to; runs on the loop."""
        ...

    def tokens_cut(self, retrieved: Ranking) -> int:
        """Document tokens that `prefix` left out for want of room; runs on the loop, after `prefix`."""
        ...


class Workload(Protocol):
    """Settings of a workload, made before any model or index is loaded."""

    def bind(self, model: LanguageModel, retriever: Retriever) -> BoundWorkload:
        """The same on a model and a knowledge base; `ValueError` where they do not fit."""
        ...
