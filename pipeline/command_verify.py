"""`ralmspec verify-lossless`: every arrangement gives RaLMSeq's tokens, shown on real questions."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ralmspec.stages.sampling import Sampling

from . import lossless, terminal
from .arrangements import Asynchronous, Continuous, Synchronous
from .engine import Engine, EngineOptions
from .options import (
    JsonOption,
    NewTokensOption,
    QuestionsOption,
    SeedOption,
    SetsOption,
    TemperatureOption,
    with_options,
)
from .reports import environment
from .speculation import Speculation
from .terminal import load, out, questions_as_typed, run

_continuous = partial(Continuous, flights=2)
_checking = partial(Synchronous, speculation_stride=8, token_check=True, certified_skip=True)


@with_options(EngineOptions)
def verify_command(
    engine_options: EngineOptions,
    max_new_tokens: NewTokensOption = 128,
    sets: SetsOption = "all",
    questions: QuestionsOption = 5,
    strides: Annotated[str, typer.Option(help="Speculation strides, with commas.")] = "1,3,8,os3",
    prefetches: Annotated[str, typer.Option(help="Prefetch widths, with commas.")] = "1,20,256",
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Show that every arrangement gives RaLMSeq's tokens and documents, on real questions.

    Runs strides × prefetch widths × asynchronous on and off, 'continuous' with two batches in flight, and synchronous
    verification with token check and certified skip; with --drafter, all of them guess with it. With --dtype float64
    every output must be identical; with float32 and below a difference must start at a logged near-tie of the model's
    scores. Exits with an error otherwise.
    """
    arrangements: Mapping[str, Speculation] = {
        f"{'async' if kind is Asynchronous else 'sync'} s={stride.strip()} P={width.strip()}": kind(
            speculation_stride=terminal.stride(stride), prefetch=terminal.number(width, "--prefetches")
        )
        for kind in (Synchronous, Asynchronous)
        for stride in strides.split(",")
        for width in prefetches.split(",")
    } | {
        f"{name} P={width.strip()}": made(prefetch=terminal.number(width, "--prefetches"))
        for name, made in (("continuous", _continuous), ("sync s=8 token check, certified skip", _checking))
        for width in prefetches.split(",")
    }

    verified(
        lambda: load(engine_options),
        questions_as_typed(sets, questions),
        arrangements,
        Sampling(temperature=temperature, seed=seed),
        max_new_tokens=max_new_tokens,
        json=json,
        sets=sets,
        questions_per_set=questions,
    )


def verified(
    opens: Callable[[], Engine],
    choose_prompts: Callable[[Engine], Sequence[str]],
    arrangements: Mapping[str, Speculation],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    json: Path | None,
    **facts: Any,
) -> None:
    """Open an engine, hold arrangements against RaLMSeq on prompts, show and write what came of it."""
    tally = lossless.Tally(list(arrangements))

    async def main() -> None:
        engine = opens()
        prompts = choose_prompts(engine)
        facts.update(
            engine.options.facts(),
            retriever=engine.description,
            max_new_tokens=max_new_tokens,
            sampling_temperature=sampling.temperature,
        )
        with terminal.progress("verifying", len(prompts) * (len(arrangements) + 1)) as tell:
            await lossless.verify(
                engine,
                prompts,
                arrangements,
                tally,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                progress=tell,
            )

    try:
        run(main)
    finally:
        if tally.outputs:
            report = tally.report(environment(**facts))
            if json:
                json.write_text(report.model_dump_json(indent=2) + "\n")
            wrong = tally.outputs - tally.identical - tally.explained
            colour = "red" if wrong else "green"
            out.print(
                f"[{colour}]{tally.outputs} outputs of {len(arrangements)} arrangements: "
                f"{tally.identical} identical to RaLMSeq's, "
                f"{tally.explained} differ at a logged near-tie, {wrong} differ unexplained[/{colour}]"
            )
            for case in tally.cases:
                gap = "the documents differ" if case.gap is None else f"gap {case.gap:.2e}"
                out.print(
                    f"  {case.arrangement}, token {case.position}, {gap} "
                    f"(tolerance {case.tolerance:g}): {escape(case.question)}",
                    highlight=False,
                )
    if tally.outputs != tally.identical + tally.explained:
        raise typer.Exit(1)
