"""Sequential retrieval-augmented generation as a plain loop, sharing nothing with the pipeline but the protocols."""

from collections.abc import Sequence

import numpy as np

from ralmspec.retrievers.base import Query, Retriever
from ralmspec.stages.model import LanguageModel, Prefix
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
            (frontier,) = model.forward([Prefix(session=session, tokens=tokens)])
            token = sampling.pick(frontier.logits, made)
            context.append(token)
            made += 1
            if (token in model.end_tokens and not ignore_eos) or made == max_new_tokens:
                return context[len(prompt) :], documents
    return context[len(prompt) :], documents
