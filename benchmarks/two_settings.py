"""Arrangements in the two settings that must not be mixed, every row measured by the wall clock.

    python benchmarks/two_settings.py               one question of the demo, a minute or two
    python benchmarks/two_settings.py --data DIR --questions 5 --max-new-tokens 128 --pad-to 2000000 --out DIR

(i)  The index has resources of its own: a *simulated* latency, set so that b/a is about 1, 2 and 6. Here every
     arrangement with A stands beside the same settings without it.
(ii) The index shares the cores with the model: the passages as they are and, with --pad-to, padded by distractors.

Published arrangements, or with --beyond RaLMSeq, +PSA as published and what goes beyond the paper: all of it, each part
alone, and all but each. With --index FOLDER --retriever KIND, and --drafter KIND, any kind of index is served.

Writes a JSON file a setting (the contract of `ralmspec compare --json`) and one Markdown file with all tables.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import anyio
import typer
from rich.console import Console

from ralmspec.pipeline import Sampling, Speculation, beyond, published
from ralmspec.pipeline.compare import Runs, report, run
from ralmspec.pipeline.engine import Engine, EngineOptions, choose_questions, open_engine
from ralmspec.pipeline.overlap import overlap_efficiency
from ralmspec.pipeline.reports import Comparison
from ralmspec.pipeline.tables import comparison_table
from ralmspec.retrievers.latency import SetLatency

DEMO = Path(__file__).parent.parent / "examples" / "demo"


def arrangements(further: bool) -> dict[str, Speculation]:
    """The rows of a table."""
    if not further:
        return {**published()}
    return {"RaLMSeq": published()["RaLMSeq"], "+PSA": published()["+PSA"], **beyond()}


def measure(
    engine: Engine,
    rows: Mapping[str, Speculation],
    questions: int,
    sets: str,
    tokens: int,
    overlap: dict[str, float],
) -> Comparison:
    """One table."""
    runs = Runs(rows)
    chosen = [question.question for _, question in choose_questions(engine.questions, sets.split(","), questions)]
    anyio.run(
        lambda: run(engine, chosen, runs, max_new_tokens=tokens, sampling=Sampling()),
        backend_options={"use_uvloop": True},
    )
    return report(runs, engine, sets=sets, max_new_tokens=tokens, overlap=overlap)


def with_latency(engine: Engine, seconds: float) -> Engine:
    """The same engine behind a set latency."""
    delayed = SetLatency(engine.index, seconds)
    options = replace(engine.options, retriever_latency=seconds)
    return replace(engine, options=options, retriever=delayed)


def markdown(name: str, made: Comparison) -> str:
    """A table as Markdown, with what it was measured on."""
    facts = made.environment
    lines = [
        f"## {name}",
        "",
        f"{facts['date']}, {facts['machine']}, {facts['retriever']}. {facts['questions']} questions ({facts['sets']}), "
        f"{facts['max_new_tokens']} tokens each, model {Path(facts['model']).name} in {facts['dtype']}, load average "
        f"{facts['load_average']:.1f}. a = {facts['a_s'] * 1e3:.0f} ms, "
        f"b = {facts['b_s'] * 1e3:.0f} ms, b/a = {facts['b_over_a']:.2f}. Two threads' work overlaps by "
        f"{facts['overlap']['efficiency']:.2f} (1: fully, 0 or less: not at all).",
        "",
        "| arrangement | latency s | speed-up | 95 % | γ | hits: cache, drafter | certified | saved | rollbacks | "
        "tokens wasted | searches | F_ideal | F_miss | identical |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in made.rows:
        gamma = "" if row.gamma is None else f"{row.gamma:.2f}"
        same = f"{row.identical}/{row.outputs}" + (f" (+{row.explained} near-ties)" if row.explained else "")
        lines.append(
            f"| {row.arrangement} | {row.latency_s:.2f} | {row.speedup:.2f} | {row.speedup_low:.2f}-"
            f"{row.speedup_high:.2f} | {gamma} | {row.cache_hits}, {row.drafter_hits} | {row.certified} | "
            f"{row.saved} | "
            f"{row.rollbacks} | {row.wasted_tokens} | {row.kb_calls} | {row.f_ideal:.2f} | {row.f_miss:.2f} | {same} |"
        )
    return "\n".join([*lines, ""])


def main(
    data: Annotated[Path, typer.Option(help="Folder with passages, embeddings and questions.")] = DEMO,
    model: Annotated[str, typer.Option(help="Model folder or hub id.")] = str(DEMO / "model"),
    index: Annotated[Path | None, typer.Option(help="An index folder, served instead of the data's passages.")] = None,
    retriever: Annotated[str, typer.Option(help="How the index is searched.")] = "exact",
    drafter: Annotated[str, typer.Option(help="Another kind of the index, which guesses.")] = "",
    further: Annotated[bool, typer.Option("--beyond", help="What goes beyond the paper, part by part.")] = False,
    only: Annotated[str, typer.Option(help="Arrangements beside RaLMSeq, with commas; all if none.")] = "",
    ratios: Annotated[str, typer.Option(help="b/a with resources of its own, with commas.")] = "1,2,6",
    questions: Annotated[int, typer.Option(min=1, help="Questions from each set.")] = 1,
    sets: Annotated[str, typer.Option(help="Question sets, with commas.")] = "nq",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 24,
    pad_to: Annotated[int, typer.Option(help="Also measure the corpus padded to so many vectors.")] = 0,
    settings: Annotated[
        str, typer.Option(help="Which of the settings: 'own', 'shared' or both, with commas.")
    ] = "own,shared",
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and Markdown.")] = None,
    name: Annotated[str, typer.Option(help="What the files' names begin with.")] = "",
) -> None:
    """Measure arrangements where the index has resources of its own, and where it has not."""
    console = Console(width=150)
    options = EngineOptions(model=model, data=data, index=index, retriever=retriever, drafter=drafter)
    engine = open_engine(options)
    overlap = overlap_efficiency(engine)
    reports: dict[str, Comparison] = {}

    def take(setting: str, one: Engine) -> None:
        # What adapts begins anew in each setting.
        rows = {n: a for n, a in arrangements(further).items() if not only or n in ("RaLMSeq", *only.split(","))}
        reports[setting] = made = measure(one, rows, questions, sets, max_new_tokens, overlap)
        console.print(comparison_table(made))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{name}{setting}.json").write_text(made.model_dump_json(indent=2) + "\n")
            text = "\n".join(markdown(setting, made) for setting, made in reports.items())
            (out / f"{name}two_settings_{'_'.join(settings.split(','))}.md").write_text(text)

    if "own" in settings:
        baseline = {"RaLMSeq": published()["RaLMSeq"]}
        a = float(measure(engine, baseline, 1, sets, max_new_tokens, overlap).environment["a_s"])
        for ratio in map(float, ratios.split(",")):
            take(f"own_resources_{ratio:g}a", with_latency(engine, round(ratio * a, 3)))
    if "shared" in settings:
        take("shared_cores", engine)
        if pad_to:
            padded = open_engine(replace(options, index=None, drafter="", pad_to=pad_to))
            take(f"shared_cores_{pad_to}", replace(padded, options=replace(options, pad_to=pad_to)))


if __name__ == "__main__":
    typer.run(main)
