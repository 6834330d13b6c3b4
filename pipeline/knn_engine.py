"""What the `knn` commands serve: a model, a datastore made with it, and KNN-LM as the workload."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ralmspec.stages.knn_lm import KnnLM

from .engine import Engine, ServingOptions, delayed, load_model

_DEFAULT: dict[str, Any] = {field.name: field.default for field in fields(KnnLM)}


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnOptions(ServingOptions):
    """KNN-LM: where the datastore lies, and the mixture's settings (see `KnnLM`)."""

    datastore: Path
    top_k: int = _DEFAULT["top_k"]
    interpolation: float = _DEFAULT["interpolation"]
    temperature: float = _DEFAULT["temperature"]
    successors: int = _DEFAULT["successors"]
    cached_documents: int = 16_384


def open_knn_engine(options: KnnOptions, *, documents: int = 0, max_prompt_tokens: int = 512) -> Engine:
    """Load everything; blocking, some seconds. One search can bring `documents` entries, `top_k` at least.

    Raises `BadModel`, also where the datastore was made by another model, `BadKnowledge` or `MissingExtra`, naming
    the file, and `ValueError` for settings that make no sense.
    """
    from ralmspec.retrievers.datastore import Datastore

    options.threads.apply()
    model = load_model(options)
    datastore = Datastore.open(options.datastore, memory=options.memory, decode=model.decode)
    index = datastore.retriever(options.retriever, options.search(documents=max(documents, options.top_k)))
    workload = KnnLM(
        datastore=datastore,
        top_k=options.top_k,
        interpolation=options.interpolation,
        temperature=options.temperature,
        successors=options.successors,
        max_prompt_tokens=max_prompt_tokens,
    )
    workload.bind(model, index)  # says now what does not fit
    drafter = None
    if options.drafter:
        drafter = datastore.retriever(options.drafter, options.search(documents=options.top_k))
    return Engine(options, model, delayed(index, options), index, workload, drafter=drafter)
