"""`ralmspec verify-lossless`: every arrangement gives RaLMSeq's tokens, shown on real questions."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from ralmspec.stages.arrangement import Arrangement
from ralmspec.stages.in_context import InContext
from ralmspec.stages.sampling import Sampling

from . import lossless, terminal
from .arrangements import Asynchronous, Synchronous
from .engine import EngineOptions, choose_questions
from .options import (
    JsonOption,
    NewTokensOption,
    QuestionsOption,
    SeedOption,
    SetsOption,
    TemperatureOption,
    with_engine,
)
from .reports import environment
from .terminal import load, out, question_sets, run


@with_engine
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

    Runs strides × prefetch widths × asynchronous on and off. With --dtype float64 every output must be identical; with
    float32 and below a difference must start at a logged near-tie of the model's scores. Exits with an error otherwise.
    """
    arrangements: dict[str, Arrangement] = {
        f"{'async' if kind is Asynchronous else 'sync'} s={stride.strip()} P={width.strip()}": kind(
            speculation_stride=terminal.stride(stride), prefetch=terminal.number(width, "--prefetches")
        )
        for kind in (Synchronous, Asynchronous)
        for stride in strides.split(",")
        for width in prefetches.split(",")
    }
    tally = lossless.Tally(list(arrangements))
    facts: dict[str, Any] = {"max_new_tokens": max_new_tokens, "questions_per_set": questions}

    async def main() -> None:
        engine = load(engine_options)
        names = question_sets(engine, sets)
        chosen = choose_questions(engine.questions, names, questions)
        facts.update(engine_options.facts(), sets=names, retriever=engine.description, temperature=temperature)
        with terminal.progress("verifying", len(chosen) * (len(arrangements) + 1)) as tell:
            await lossless.verify(
                engine,
                [question for _, question in chosen],
                arrangements,
                tally,
                workload=InContext(),
                max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature=temperature, seed=seed),
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
