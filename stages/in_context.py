"""In-context RaLM: the newest document stands before the prompt and is replaced at every step (paper, section 2).

Query: the last 32 tokens of prompt and generated text, decoded. Document: title, newline, text, at most 256 tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ralmspec.retrievers.base import Ids, Query, Ranking, Retriever

from .errors import DocumentTooLong
from .messages import Check, Source
from .model import Frontier, LanguageModel, Tokens
from .prompt import read_prompt
from .sampling import Logits


@dataclass(frozen=True, slots=True, kw_only=True)
class InContext:
    """Settings of in-context RaLM; the defaults are the paper's.

    `truncate=False` refuses prompts and documents that are too long (`PromptTooLong`, `DocumentTooLong`) instead of
    cutting prompts on the left and documents on the right. What was cut is reported in the session's statistics.
    """

    retrieval_stride: int = 4
    query_tokens: int = 32
    max_prompt_tokens: int = 512
    max_document_tokens: int = 256
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("retrieval_stride", "query_tokens", "max_prompt_tokens", "max_document_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"InContext({name}={getattr(self, name)}): must be at least 1")

    def bind(self, model: LanguageModel, retriever: Retriever) -> "BoundInContext":
        """These settings on a model and a knowledge base."""
        return BoundInContext(self, model, retriever)


class BoundInContext:
    """In-context RaLM on one model and one knowledge base."""

    top_k = 1
    asks_with_frontier = False

    def __init__(self, settings: InContext, model: LanguageModel, retriever: Retriever) -> None:
        self.settings = settings
        self.retrieval_stride = settings.retrieval_stride
        self._model = model
        self._retriever = retriever
        # Both threads, the loop and the model's worker, ask for the same few documents again and again.
        self._document = lru_cache(maxsize=4096)(self._read_document)
        self._title = lru_cache(maxsize=4096)(lambda id: retriever.document(id).title)

    def prompt(self, text: str) -> tuple[list[int], int]:
        """Tokens of the prompt, cut on the left to `max_prompt_tokens`, and how many were cut."""
        settings = self.settings
        return read_prompt(self._model, text, limit=settings.max_prompt_tokens, truncate=settings.truncate)

    def room(self) -> int:
        """Longest prefix before the first generated token."""
        return len(self._model.start_tokens) + self.settings.max_document_tokens + self.settings.max_prompt_tokens

    def query(self, context: Sequence[int], frontier: Frontier | None) -> Query:
        """The last `query_tokens` tokens as text."""
        return Query(text=self._model.decode(context[-self.settings.query_tokens :]))

    def prefix(self, context: Sequence[int], retrieved: Ranking | None) -> Tokens:
        """Document, then context."""
        assert retrieved is not None, "the document stands in the prefix"
        document, _ = self._document(int(retrieved.ids[0]))
        return np.concatenate((document, np.asarray(context, dtype=np.int64)))

    def logits(self, frontier: Frontier, retrieved: Ranking) -> Logits:
        """The model's own; the document has already spoken through the prefix."""
        return frontier.logits

    def agree(self, check: Check, truth: Ranking) -> bool:
        """Same document."""
        assert check.guess is not None, "what was not guessed is not judged"
        return bool(check.guess.ids[0] == truth.ids[0])

    def around(self, ids: Ids) -> Ids:
        """What was found."""
        return ids

    def source(self, retrieved: Ranking) -> Source:
        """The document with its title and score."""
        id = int(retrieved.ids[0])
        return Source(id, self._title(id), float(retrieved.scores[0]))

    def tokens_cut(self, retrieved: Ranking) -> int:
        """Tokens by which the document was longer than `max_document_tokens`."""
        return self._document(int(retrieved.ids[0]))[1]

    def _read_document(self, id: int) -> tuple[Tokens, int]:
        document = self._retriever.document(id)
        limit = self.settings.max_document_tokens
        tokens = self._model.encode(f"{document.title}\n{document.text}\n")
        cut = max(0, len(tokens) - limit)
        if cut and not self.settings.truncate:
            raise DocumentTooLong(
                f"document {id} ({document.title!r}) has {len(tokens)} tokens, {limit} are allowed: "
                "split it, raise max_document_tokens, or truncate"
            )
        return np.asarray([*self._model.start_tokens, *tokens[:limit]], dtype=np.int64), cut
