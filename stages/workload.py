"""What a workload supplies: how to ask, what to condition on, and what that does to the scores of the next token.

No stage knows which workload it serves. The settings a user writes are a `Workload`; bound to a model and a knowledge
base they become a `BoundWorkload`, which the stages use.

There are two ways to condition on documents. A workload may put them into the prefix: then a step under other documents
needs forward passes of its own, and a guess was right if it named the same documents. Or its prefix does without them,
they only change the scores, and its query is made from the *frontier*, what the model knows at the end of the context:
then the step's token can be chosen again from the same frontier, and a guess was right if its token was.
"""

from collections.abc import Sequence
from typing import Protocol

from ralmspec.retrievers.base import Ids, Query, Ranking, Retriever

from .messages import Check, Source
from .model import Frontier, LanguageModel, Tokens
from .sampling import Logits


class BoundWorkload(Protocol):
    """A workload on one model and one knowledge base. Its methods are pure: same inputs, same answer."""

    @property
    def retrieval_stride(self) -> int:
        """Tokens per step; 1 where queries need the frontier."""
        ...

    @property
    def asks_with_frontier(self) -> bool:
        """Whether a query is made from the frontier, and `prefix` does without documents."""
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

    def query(self, context: Sequence[int], frontier: Frontier | None) -> Query:
        """The next step's question, from prompt and generated tokens, or from the frontier; runs on the loop."""
        ...

    def prefix(self, context: Sequence[int], retrieved: Ranking | None) -> Tokens:
        """What the model is to continue, int64 [n]; runs in the model's worker."""
        ...

    def logits(self, frontier: Frontier, retrieved: Ranking) -> Logits:
        """What the next token is picked from, [vocabulary], given what the model knows and what was retrieved.

        Runs in the model's worker and in the index's.
        """
        ...

    def agree(self, check: Check, truth: Ranking) -> bool:
        """Whether the step begun under `check.guess`, which is not None, is what it would be under `truth`.

        Runs in the index's worker.
        """
        ...

    def around(self, ids: Ids) -> Ids:
        """Documents to have in the cache after a search has found `ids`, best first; runs in the index's worker."""
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
