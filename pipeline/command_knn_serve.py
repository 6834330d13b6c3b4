"""`ralmspec knn ask`, `knn compare` and `knn verify-lossless`: KNN-LM served, compared and held against the oracle."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from ralmspec.stages.sampling import Sampling

from . import terminal
from .arrangements import Asynchronous, Continuous, Sequential, Synchronous
from .command_ask import answered
from .command_compare import chosen_from, compared
from .command_verify import verified
from .engine import Engine
from .held_out import held_out_prompts
from .knn_engine import KnnOptions, open_knn_engine
from .line_up import by_stride
from .options import (
    JsonOption,
    NewTokensOption,
    SamplingTemperatureOption,
    SeedOption,
    TimelineOption,
    TraceOption,
    with_options,
)
from .speculation import Speculation

TextArgument = Annotated[
    Path, typer.Argument(help="A text that is not in the datastore, .txt or .txt.gz: prompts are stretches of it.")
]
PromptsOption = Annotated[int, typer.Option(min=1, help="Prompts, spread evenly over the text.")]
PromptTokensOption = Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")]
PrefetchOption = Annotated[
    int, typer.Option(min=1, help="Neighbours that every search brings into the cache, at least --top-k.")
]
FlightsOption = Annotated[
    int, typer.Option(min=1, help="Batches of checks in flight at once in 'continuous'; see --retriever-concurrency.")
]


@with_options(KnnOptions)
def ask_command(
    engine_options: KnnOptions,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.", show_default=False)],
    max_new_tokens: NewTokensOption = 128,
    prefetch: PrefetchOption = 256,
    sequential: Annotated[bool, typer.Option("--sequential", help="Do not speculate at all.")] = False,
    drafts: Annotated[
        bool, typer.Option("--drafts", help="On a terminal, also show drafts (dim) and what is retracted (struck out).")
    ] = False,
    sources: Annotated[
        bool, typer.Option("--sources", help="List the nearest entry of each token at the end.")
    ] = False,
    sampling_temperature: SamplingTemperatureOption = 0.0,
    seed: SeedOption = 0,
) -> None:
    """Go on from a prompt with KNN-LM, streaming verified text as it is committed."""
    answered(
        lambda: _load(engine_options, prefetch),
        prompt,
        Sequential() if sequential else Continuous(prefetch=prefetch),
        Sampling(temperature=sampling_temperature, seed=seed),
        max_new_tokens=max_new_tokens,
        drafts=drafts,
        sources=sources,
    )


@with_options(KnnOptions)
def compare_command(
    engine_options: KnnOptions,
    text: TextArgument,
    prompts: PromptsOption = 20,
    prompt_tokens: PromptTokensOption = 64,
    max_new_tokens: NewTokensOption = 64,
    prefetch: PrefetchOption = 256,
    flights: FlightsOption = 1,
    only: Annotated[str, typer.Option(help="Arrangements beside RaLMSeq, with commas.")] = "",
    sampling_temperature: SamplingTemperatureOption = 0.0,
    seed: SeedOption = 0,
    json: JsonOption = None,
    trace: TraceOption = None,
    timeline: TimelineOption = None,
) -> None:
    """Serve the same prompts with sequential KNN-LM and with speculation, and compare.

    Fixed speculation strides and the scheduler OS3, each without and with asynchronous verification (+A), 'continuous',
    where decoding never waits, and 'adaptive', which learns from one prompt to the next. The columns are those of
    `ralmspec compare`.
    """
    arrangements = by_stride(prefetch, flights)
    compared(
        lambda: _load(engine_options, prefetch, prompt_tokens),
        _stretches(text, prompts, prompt_tokens),
        chosen_from(arrangements, only, [*arrangements]),
        Sampling(temperature=sampling_temperature, seed=seed),
        max_new_tokens=max_new_tokens,
        json=json,
        trace=trace,
        timeline=timeline,
        text=text.name,
        prompt_tokens=prompt_tokens,
        prefetch=prefetch,
    )


@with_options(KnnOptions)
def verify_command(
    engine_options: KnnOptions,
    text: TextArgument,
    prompts: PromptsOption = 20,
    prompt_tokens: PromptTokensOption = 64,
    max_new_tokens: NewTokensOption = 64,
    strides: Annotated[str, typer.Option(help="Speculation strides, with commas.")] = "1,2,4,8,os3",
    prefetch: PrefetchOption = 256,
    sampling_temperature: SamplingTemperatureOption = 0.0,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Show that every arrangement gives sequential KNN-LM's tokens and nearest entries, on real text.

    Runs the strides with asynchronous verification on and off, and 'continuous' with one and two flights. Exits with an
    error if an output differs and no near-tie of the scores explains it.
    """
    arrangements: Mapping[str, Speculation] = {
        f"{'async' if kind is Asynchronous else 'sync'} s={stride.strip()}": kind(
            speculation_stride=terminal.stride(stride), prefetch=prefetch
        )
        for kind in (Synchronous, Asynchronous)
        for stride in strides.split(",")
    } | {
        "continuous": Continuous(prefetch=prefetch),
        "continuous, 2 flights": Continuous(prefetch=prefetch, flights=2),
    }
    verified(
        lambda: _load(engine_options, prefetch, prompt_tokens),
        _stretches(text, prompts, prompt_tokens),
        arrangements,
        Sampling(temperature=sampling_temperature, seed=seed),
        max_new_tokens=max_new_tokens,
        json=json,
        text=text.name,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
    )


def _load(options: KnnOptions, prefetch: int, prompt_tokens: int = 512) -> Engine:
    return terminal.opened(
        "loading model and datastore",
        lambda: open_knn_engine(options, documents=prefetch, max_prompt_tokens=prompt_tokens),
    )


def _stretches(text: Path, prompts: int, tokens: int) -> Callable[[Engine], list[str]]:
    return lambda engine: held_out_prompts(engine.model, text, count=prompts, tokens=tokens)
