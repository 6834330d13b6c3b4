"""`ralmspec compare`: the same questions in every arrangement, side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ralmspec.stages.arrangement import Arrangement
from ralmspec.stages.in_context import InContext
from ralmspec.stages.sampling import Sampling

from . import chrome_trace, compare, terminal
from .arrangements import MAIN_TABLE, published
from .engine import Engine, EngineOptions, choose_questions
from .options import (
    JsonOption,
    NewTokensOption,
    QuestionsOption,
    SeedOption,
    SetsOption,
    TemperatureOption,
    with_engine,
)
from .overlap import overlap_efficiency
from .tables import comparison_table
from .terminal import err, load, out, question_sets, run


@with_engine
def compare_command(
    engine_options: EngineOptions,
    max_new_tokens: NewTokensOption = 128,
    sets: SetsOption = "nq",
    questions: QuestionsOption = 10,
    prefetch: Annotated[
        int, typer.Option(min=1, help="Documents that a search brings in the arrangements with P.")
    ] = 20,
    only: Annotated[str, typer.Option(help="Arrangements beside RaLMSeq, with commas; +PS, +SA, +PA too.")] = "",
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    json: JsonOption = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write Chrome trace JSON of the first question, for Perfetto.")
    ] = None,
) -> None:
    """Serve the same questions with RaLMSeq and the paper's arrangements, and compare.

    Paired and interleaved; every output is compared with RaLMSeq's, and an unexplained difference makes the command
    fail. speed-up: ratio of mean latencies. F_ideal: share of the time that a retriever without cost would take.
    F_miss: the same for one whose only cost is the first search and real misses.
    """
    arrangements = published(prefetch)
    names = [name.strip() for name in only.split(",")] if only else [*MAIN_TABLE]
    _known(names, arrangements)
    arrangements = {n: a for n, a in arrangements.items() if n == compare.BASELINE or n in names}
    runs = compare.Runs(arrangements)
    facts: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    opened: list[Engine] = []

    async def main() -> None:
        engine = load(engine_options)
        opened.append(engine)
        chosen = choose_questions(engine.questions, question_sets(engine, sets), questions)
        with err.status("measuring how far two threads overlap on these cores"):
            facts["overlap"] = overlap_efficiency(engine)
        with terminal.progress("comparing", len(chosen) * len(arrangements) + len(arrangements)) as tell:
            await compare.run(
                engine,
                [question for _, question in chosen],
                runs,
                workload=InContext(),
                max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature=temperature, seed=seed),
                trace=trace is not None,
                progress=tell,
            )

    try:
        run(main)
    finally:  # what was measured before an interruption is still shown and written
        if runs.complete and opened:
            _report(runs, opened[0], facts, sets, json, trace)
    wrong = sum(r.outputs - r.identical - r.explained for r in compare.rows(runs, ""))
    if wrong:
        err.print(f"[red]{wrong} outputs differ from RaLMSeq's, unexplained[/red]")
        raise typer.Exit(1)


def _report(
    runs: compare.Runs, engine: Engine, facts: dict[str, Any], sets: str, json: Path | None, trace: Path | None
) -> None:
    report = compare.report(runs, engine, sets=sets, **facts)
    out.print(comparison_table(report))
    if json:
        json.write_text(report.model_dump_json(indent=2) + "\n")
    if trace:
        chrome_trace.write(trace, {name: answers[0].timeline for name, answers in runs.answers.items()})
        err.print(f"timelines of the first question: {trace} (open it in https://ui.perfetto.dev)")


def _known(names: list[str], arrangements: dict[str, Arrangement]) -> None:
    for name in names:
        if name not in arrangements:
            raise typer.BadParameter(f"--only: {name!r} is not one of {', '.join(arrangements)}")
