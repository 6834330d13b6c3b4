"""Compares an output with RaLMSeq's, and explains a difference by a near-tie, or does not."""

from dataclasses import dataclass

from ralmspec.retrievers.base import Ranking, Retriever
from ralmspec.stages.model import Frontier, LanguageModel, Prefix, read_to_end
from ralmspec.stages.sampling import Sampling
from ralmspec.stages.workload import BoundWorkload

from .stream import Answer

TOLERANCE = {"float64": 0.0, "float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
"""Largest gap between the two best scores that rounding may turn round, by dtype. A float32 logit of a small model
moves by about 1e-5 with the chunking of a prefill; the tolerance allows for two orders more and no further."""

_AUDITOR = -1  # no served session has a negative number


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two outputs part."""

    position: int
    gap: float | None
    explained: bool


def differ(
    reference: Answer,
    answer: Answer,
    *,
    prompt: str,
    model: LanguageModel,
    retriever: Retriever,
    workload: BoundWorkload,
    sampling: Sampling,
    dtype: str,
) -> Difference | None:
    """None for the same tokens and documents; else the first difference. Blocking: it may search and run the model."""
    documents = [step.document.id for step in reference.steps]
    if answer.tokens == reference.tokens and [step.document.id for step in answer.steps] == documents:
        return None
    pairs = zip(reference.tokens, answer.tokens, strict=False)
    position = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(reference.tokens), len(answer.tokens)))
    step = position // workload.retrieval_stride
    same_documents = documents[: step + 1] == [s.document.id for s in answer.steps[: step + 1]]
    if position >= len(reference.tokens) or not same_documents:
        return Difference(position, None, explained=False)

    def read(tokens: int, retrieved: Ranking | None) -> Frontier:
        """What the model knows after the prompt and so many of the reference's tokens."""
        prefix = workload.prefix([*start, *reference.tokens[:tokens]], retrieved)
        frontier = read_to_end(model, Prefix(session=_AUDITOR, tokens=prefix))
        model.forget(_AUDITOR)
        return frontier

    start, begun = workload.prompt(prompt)[0], step * workload.retrieval_stride
    asked_with = read(begun, None) if workload.asks_with_frontier else None
    queries = retriever.encode([workload.query([*start, *reference.tokens[:begun]], asked_with)])
    (truth,) = retriever.search(queries, workload.top_k)
    gap = sampling.gap(workload.logits(read(position, truth), truth), position)
    return Difference(position, gap, explained=gap <= TOLERANCE.get(dtype, 0.0))
