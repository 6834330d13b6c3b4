"""Walks RaLMSeq's path through a question and keeps what it met, so that guesses can be judged without the model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ralmspec.retrievers.base import Query, Ranking
from ralmspec.stages.model import Frontier, Prefix, read_to_end
from ralmspec.stages.sampling import Sampling
from ralmspec.stages.workload import BoundWorkload

from .engine import Engine

_TRUE, _DRAFTED = -1, -2  # the model keeps keys and values apart for what is walked and what is tried
_GREEDY = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PathStep:
    """One step of the true path. Times in seconds.

    `begins` is the number of context tokens, the prompt's included, before the step; `wide` what a wide search brings.
    """

    begins: int
    query: Query
    truth: Ranking
    wide: Ranking
    tokens: tuple[int, ...]
    new_document: bool
    """Whether it stands under another document than the step before; the first one does."""
    encode_s: float
    search_s: float
    """Of the search for `truth`; the wide one is not timed."""
    first_pass_s: float
    """Until the model has read all but the tokens to come: document and context where the document is new."""
    decode_s: float
    """For the tokens after the first."""

    @property
    def document(self) -> int:
        """The document that the step stands under."""
        return int(self.truth.ids[0])


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """The true path through one question: `context` is prompt and generated tokens."""

    context: tuple[int, ...]
    steps: tuple[PathStep, ...]


class Walker:
    """Serves questions as RaLMSeq does, greedily, one at a time, on the engine's model and retriever. Blocking.

    For workloads that put the retrieved document into the prefix and ask with text; others raise `ValueError`.
    """

    def __init__(self, engine: Engine, *, max_new_tokens: int, wide: int) -> None:
        self.engine = engine
        self.workload: BoundWorkload = engine.workload.bind(engine.model, engine.index)
        if self.workload.asks_with_frontier:
            raise ValueError("locality is measured for workloads that put the document into the prefix")
        self._tokens = max_new_tokens
        self._wide = wide

    def walk(self, question: str) -> Path:
        """The whole path; an end of sequence does not end it, so that all paths are equally long."""
        prompt, _ = self.workload.prompt(question)
        context, steps = list(prompt), list[PathStep]()
        try:
            while len(context) - len(prompt) < self._tokens:
                left = self._tokens - (len(context) - len(prompt))
                steps.append(self._step(context, steps[-1].document if steps else -1, left))
                context += steps[-1].tokens
        finally:
            self.engine.model.forget(_TRUE)
        return Path(tuple(context), tuple(steps))

    def _step(self, context: list[int], before: int, left: int) -> PathStep:
        start = time.perf_counter()
        query = self.ask(context)
        encoded = time.perf_counter()
        (truth,) = self.engine.retriever.search([query], self.workload.top_k)
        searched = time.perf_counter()
        (wide,) = self.engine.index.search([query], self._wide)
        own = list(context)
        begun = time.perf_counter()
        self._decode(own, truth, 1, _TRUE)
        first = time.perf_counter()
        self._decode(own, truth, min(self.workload.retrieval_stride, left) - 1, _TRUE)
        return PathStep(
            begins=len(context),
            query=query,
            truth=truth,
            wide=wide,
            tokens=tuple(own[len(context) :]),
            new_document=int(truth.ids[0]) != before,
            encode_s=encoded - start,
            search_s=searched - encoded,
            first_pass_s=first - begun,
            decode_s=time.perf_counter() - first,
        )

    def ask(self, context: Sequence[int]) -> Query:
        """The query that a step after this context begins with, encoded."""
        (query,) = self.engine.index.encode([self.workload.query(context, None)])
        return query

    def draft(self, context: Sequence[int], document: Ranking, tokens: int) -> tuple[int, ...]:
        """So many tokens after this context, had this been the document."""
        own = list(context)
        self._decode(own, document, tokens, _DRAFTED)
        return tuple(own[len(context) :])

    def forget_drafts(self) -> None:
        """Free the model's memory of what `draft` has read."""
        self.engine.model.forget(_DRAFTED)

    def _decode(self, context: list[int], document: Ranking, tokens: int, session: int) -> None:
        for _ in range(tokens):
            prefix = self.workload.prefix(context, document)
            frontier: Frontier = read_to_end(self.engine.model, Prefix(session=session, tokens=prefix))
            context.append(_GREEDY.pick(self.workload.logits(frontier, document), len(context)))
