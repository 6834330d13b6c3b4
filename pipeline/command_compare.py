"""`ralmspec compare`: the same questions in every arrangement, side by side."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ralmspec.stages.sampling import Sampling

from . import chrome_trace, compare, terminal
from . import timeline as pictures
from .engine import Engine, EngineOptions
from .line_up import MAIN_TABLE, beyond, published
from .options import (
    JsonOption,
    NewTokensOption,
    QuestionsOption,
    SeedOption,
    SetsOption,
    TemperatureOption,
    TimelineOption,
    TraceOption,
    with_options,
)
from .overlap import overlap_efficiency
from .speculation import Speculation
from .tables import comparison_table
from .terminal import err, load, out, questions_as_typed, run

DEFAULT = (*MAIN_TABLE, "continuous", "adaptive")


@with_options(EngineOptions)
def compare_command(
    engine_options: EngineOptions,
    max_new_tokens: NewTokensOption = 128,
    sets: SetsOption = "nq",
    questions: QuestionsOption = 10,
    prefetch: Annotated[
        int, typer.Option(min=1, help="Documents that a search brings in the arrangements with P.")
    ] = 20,
    wide_prefetch: Annotated[
        int, typer.Option(min=1, help="The same for what goes beyond the paper: W, continuous, adaptive.")
    ] = 256,
    only: Annotated[
        str,
        typer.Option(help="Arrangements beside RaLMSeq, with commas; +PS, +SA, +PA, +PSA+C, continuous-C... too."),
    ] = "",
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    json: JsonOption = None,
    trace: TraceOption = None,
    timeline: TimelineOption = None,
) -> None:
    """Serve the same questions with RaLMSeq, the paper's arrangements and ours, and compare.

    Paired and interleaved; every output is compared with RaLMSeq's, and an unexplained difference makes the command
    fail. speed-up: ratio of mean latencies. F_ideal: share of the time that a retriever without cost would take.
    F_miss: the same for one whose only cost is the first search and real misses.
    """

    compared(
        lambda: load(engine_options),
        questions_as_typed(sets, questions),
        chosen_from({**published(prefetch), **beyond(wide_prefetch)}, only, DEFAULT),
        Sampling(temperature=temperature, seed=seed),
        max_new_tokens=max_new_tokens,
        json=json,
        trace=trace,
        timeline=timeline,
        sets=sets,
        prefetch=prefetch,
        wide_prefetch=wide_prefetch,
    )


def compared(
    opens: Callable[[], Engine],
    choose_prompts: Callable[[Engine], Sequence[str]],
    arrangements: Mapping[str, Speculation],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    json: Path | None,
    trace: Path | None,
    timeline: Path | None,
    **facts: Any,
) -> None:
    """Open an engine, compare arrangements on prompts, show and write what came of it; `facts` go into the report."""
    if timeline:  # what it lacks is better said before
        with terminal.ends_in_a_sentence():
            pictures.check(timeline)
    runs = compare.Runs(arrangements)
    facts["max_new_tokens"] = max_new_tokens
    opened: list[Engine] = []

    async def main() -> None:
        engine = opens()
        opened.append(engine)
        prompts = choose_prompts(engine)
        with err.status("measuring how far two threads overlap on these cores"):
            facts["overlap"] = overlap_efficiency(engine)
        with terminal.progress("comparing", len(prompts) * len(arrangements) + len(arrangements)) as tell:
            await compare.run(
                engine,
                prompts,
                runs,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                trace=bool(trace or timeline),
                progress=tell,
            )

    try:
        run(main)
    finally:  # what was measured before an interruption is still shown and written
        if runs.complete and opened:
            _report(runs, opened[0], facts, json, trace, timeline)
    wrong = sum(r.outputs - r.identical - r.explained for r in compare.rows(runs, ""))
    if wrong:
        err.print(f"[red]{wrong} outputs differ from RaLMSeq's, unexplained[/red]")
        raise typer.Exit(1)


def chosen_from(arrangements: Mapping[str, Speculation], only: str, default: Sequence[str]) -> dict[str, Speculation]:
    """RaLMSeq, and those that were typed, with commas between them; the default ones if none were."""
    names = [name.strip() for name in only.split(",")] if only else [*default]
    if unknown := [name for name in names if name not in arrangements]:
        raise typer.BadParameter(f"--only: {unknown[0]!r} is not one of {', '.join(arrangements)}")
    return {n: a for n, a in arrangements.items() if n == compare.BASELINE or n in names}


def _report(
    runs: compare.Runs,
    engine: Engine,
    facts: dict[str, Any],
    json: Path | None,
    trace: Path | None,
    timeline: Path | None,
) -> None:
    report = compare.report(runs, engine, **facts)
    out.print(comparison_table(report))
    if json:
        json.write_text(report.model_dump_json(indent=2) + "\n")
    first = {name: answers[0].timeline for name, answers in runs.answers.items()}
    if timeline:
        pictures.write(timeline, first, title=engine.retriever.description)
        err.print(f"how the first question was served: {timeline}")
    if trace:
        chrome_trace.write(trace, first)
        err.print(f"timelines of the first question: {trace} (open it in https://ui.perfetto.dev)")
