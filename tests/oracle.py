"""Sequential retrieval-augmented generation as a plain loop, sharing nothing with the pipeline but the protocols."""

from collections.abc import Sequence

import numpy as np

from ralmspec.pipeline import KnnLM
from ralmspec.retrievers.base import Query, Retriever
from ralmspec.stages.model import LanguageModel, Prefix, read_to_end
from ralmspec.stages.sampling import Sampling


def sequential(
    model: LanguageModel,
    retriever: Retriever,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    retrieval_stride: int = 4,
    query_tokens: int = 32,
    max_document_tokens: int = 256,
    sampling: Sampling | None = None,
    ignore_eos: bool = False,
    session: int = -1,
) -> tuple[list[int], list[int]]:
    """Generated tokens, and the document of every step."""
    context, documents, sampling = list(prompt), [], sampling or Sampling()
    made = 0
    while made < max_new_tokens:
        text = model.decode(context[-query_tokens:])
        (query,) = retriever.encode([Query(text=text)])
        (ranking,) = retriever.search([query], 1)
        document = retriever.document(int(ranking.ids[0]))
        documents.append(document.id)
        before = model.encode(f"{document.title}\n{document.text}\n")[:max_document_tokens]
        before = [*model.start_tokens, *before]
        for _ in range(retrieval_stride):
            tokens = np.array([*before, *context], dtype=np.int64)
            frontier = read_to_end(model, Prefix(session=session, tokens=tokens))
            token = sampling.pick(frontier.logits, made)
            context.append(token)
            made += 1
            if (token in model.end_tokens and not ignore_eos) or made == max_new_tokens:
                return context[len(prompt) :], documents
    return context[len(prompt) :], documents


def sequential_knn(
    model: LanguageModel,
    retriever: Retriever,
    settings: KnnLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    ignore_eos: bool = False,
    session: int = -1,
) -> tuple[list[int], list[int]]:
    """Generated tokens of KNN-LM, and the nearest entry of every one."""
    context, nearest, sampling = list(prompt), [], sampling or Sampling()
    for made in range(max_new_tokens):
        tokens = np.array([*model.start_tokens, *context], dtype=np.int64)
        frontier = read_to_end(model, Prefix(session=session, tokens=tokens))
        (ranking,) = retriever.search([Query(text="", vector=frontier.key)], settings.top_k)
        nearest.append(int(ranking.ids[0]))
        logits = frontier.logits.astype(np.float64)
        odds = np.exp(logits - logits.max())
        mixture = (1 - settings.interpolation) * odds / odds.sum()
        distances = -ranking.scores.astype(np.float64)
        weights = np.exp((distances[0] - distances) / settings.temperature)
        for id, weight in zip(ranking.ids, weights / weights.sum(), strict=True):
            mixture[settings.datastore.values[id]] += settings.interpolation * weight
        with np.errstate(divide="ignore"):
            token = sampling.pick(np.log(mixture), made)
        context.append(token)
        if token in model.end_tokens and not ignore_eos:
            break
    return context[len(prompt) :], nearest
