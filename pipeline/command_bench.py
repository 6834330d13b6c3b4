"""`ralmspec bench`: what the parts of a served request cost on this machine."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ralmspec.retrievers.index import SearchOptions, open_index
from ralmspec.retrievers.index_parts import KINDS
from ralmspec.retrievers.manifest import Manifest

from . import terminal
from .batch_cost import BatchCost, batch_costs, real_queries
from .engine import Engine, EngineOptions
from .figures import figure_class
from .locality import Walker
from .locality_counts import WIDE, Counts, in_turns, instruments
from .locality_drafts import KINDS as DRAFT_KINDS
from .locality_report import figures, markdown, plot, tables
from .options import NewTokensOption, QuestionsOption, SetsOption, with_options
from .reports import environment
from .terminal import ends_in_a_sentence, err, out, questions_by_set
from .thread_budget import ThreadBudget

app = typer.Typer(help="Measure what the parts cost here.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure what the parts cost here."""


@app.command("retrieval")
def retrieval(
    index: Annotated[Path, typer.Option(help="An index folder, made by `ralmspec index build`.", show_default=False)],
    kinds: Annotated[str, typer.Option(help="Kinds of retriever, with commas; 'all' for all in the index.")] = "all",
    batches: Annotated[str, typer.Option(help="Queries in one search, with commas.")] = "1,2,4,8,16,32",
    threads: Annotated[str, typer.Option(help="Cores for a search, with commas.")] = "1,2",
    top: Annotated[int, typer.Option(min=1, help="Documents that a search brings.")] = 20,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each figure, at least five searches.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the choice of queries.")] = 0,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for a table (.md), the figures (.json) and a plot (.svg).")
    ] = None,
) -> None:
    """Time searches of 1, 2, 4, ... queries in every kind of retriever: b(batch), which decides what batching saves.

    Queries are pieces of the passages' own text, about 32 tokens each, and are encoded before the clock starts.
    """
    sizes = [terminal.number(size, "--batches") for size in batches.split(",")]
    cores = [terminal.number(count, "--threads") for count in threads.split(",")]
    costs: list[BatchCost] = []
    with ends_in_a_sentence():
        if out_folder is not None:
            figure_class()
        held = [kind for kind in KINDS if kind in Manifest.read(index).kinds]
        chosen = held if kinds == "all" else [kind.strip() for kind in kinds.split(",")]
        ThreadBudget().apply()
        with terminal.progress("measuring", len(chosen) * len(cores)) as tell:
            for kind in chosen:
                for count in cores:
                    tell(f"{kind}, {count} threads")
                    retriever = open_index(index, kind, SearchOptions(threads=count, jvm_threads=count))
                    queries = real_queries(retriever, max(64, *sizes), seed)
                    costs += batch_costs(kind, retriever, queries, sizes, threads=count, k=top, seconds=seconds)
    out.print(_table(costs, sizes))
    if out_folder is not None:
        out_folder.mkdir(parents=True, exist_ok=True)
        facts = environment(index=index.name, k=top, queries="24 words of the passages' text", seed=seed)
        report = {"environment": facts, "rows": [asdict(cost) for cost in costs]}
        (out_folder / "retrieval.json").write_text(json.dumps(report, indent=2) + "\n")
        (out_folder / "retrieval.md").write_text(_markdown(costs, sizes, facts))
        _plot(costs, out_folder / "retrieval.svg")
        err.print(f"written: retrieval.json, retrieval.md and retrieval.svg in {out_folder}")


@app.command("locality")
@with_options(EngineOptions)
def locality(
    engine_options: EngineOptions,
    max_new_tokens: NewTokensOption = 128,
    sets: SetsOption = "all",
    questions: QuestionsOption = 100,
    drafts: Annotated[
        str, typer.Option(help="Draft indexes over a dense retriever's vectors, with commas; none if empty.")
    ] = ",".join(DRAFT_KINDS),
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the figures (.json), tables (.md) and a plot (.svg).")
    ] = None,
) -> None:
    """Walk RaLMSeq's path through questions and tell what could have been guessed along it.

    How often guesses from the session's cache, with more or less prefetched, or from approximate indexes beside it are
    right; whether a wrong guess's tokens survive under the true document (p4); how often no search was needed at all;
    and how the time of a step splits. Ctrl-C ends it with the questions walked so far.
    """
    counts: list[Counts] = []
    opened: list[Engine] = []
    with ends_in_a_sentence():
        if out_folder is not None:
            figure_class()
        kinds = [kind.strip() for kind in drafts.split(",") if kind.strip()]
        try:
            engine = terminal.load(engine_options)
            opened.append(engine)
            chosen = in_turns(questions_by_set(engine, sets, questions))
            walker = Walker(engine, max_new_tokens=max_new_tokens, wide=WIDE)
            with err.status("building draft indexes"):
                tools = instruments(walker, kinds)
            with terminal.progress("walking", len(chosen)) as tell:
                for name, question in chosen:
                    tell(question)
                    counts.append(tools.measure(name, question))
        finally:  # what was measured before an interruption is still shown and written
            if counts:
                _report_locality(counts, opened[0], max_new_tokens, out_folder)


def _report_locality(counts: list[Counts], engine: Engine, max_new_tokens: int, folder: Path | None) -> None:
    measured = {
        "questions": len(counts),
        "questions_by_set": dict(Counter(one.question_set for one in counts)),
        "max_new_tokens": max_new_tokens,
        "retriever": engine.description,
    }
    facts = environment(**engine.options.facts() | measured)
    found = figures(counts)
    for table in tables(found):
        out.print(table)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        report = {"environment": facts, "figures": [asdict(figure) for figure in found]}
        (folder / "locality.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "locality.md").write_text(markdown(found, facts))
        plot(found, folder / "locality.svg", figure_class())
        err.print(f"written: locality.json, locality.md and locality.svg in {folder}")


def _lines(costs: list[BatchCost], sizes: list[int]) -> list[list[str]]:
    """One line a retriever and number of threads: milliseconds of a batch, and of the largest per query."""
    lines = []
    for kind, count in dict.fromkeys((cost.kind, cost.threads) for cost in costs):
        taken = {cost.batch: cost.median_s * 1e3 for cost in costs if (cost.kind, cost.threads) == (kind, count)}
        saved = taken[sizes[0]] / sizes[0] / (taken[sizes[-1]] / sizes[-1])
        lines.append([kind, str(count), *(f"{taken[size]:.2f}" for size in sizes), f"{saved:.1f}"])
    return lines


def _head(sizes: list[int]) -> list[str]:
    return ["retriever", "threads", *map(str, sizes), f"a query alone / in {sizes[-1]}"]


def _table(costs: list[BatchCost], sizes: list[int]) -> Table:
    table = Table(title="one search, in milliseconds (median), by the number of its queries")
    for column in _head(sizes):
        table.add_column(column, justify="left" if column == "retriever" else "right")
    for line in _lines(costs, sizes):
        table.add_row(*line)
    return table


def _markdown(costs: list[BatchCost], sizes: list[int], facts: dict[str, object]) -> str:
    lines = [
        f"One search of {facts['index']}, in milliseconds (median), by the number of its queries, k = {facts['k']}.",
        f"{facts['date']}, {facts['machine']}, load average {facts['load_average']}. `{facts['command']}`",
        "",
        "| " + " | ".join(_head(sizes)) + " |",
        "|" + "---|" * (len(sizes) + 3),
        *("| " + " | ".join(line) + " |" for line in _lines(costs, sizes)),
        "",
        *(f"- {kind}: {name}" for kind, name in dict.fromkeys((cost.kind, cost.retriever) for cost in costs)),
    ]
    return "\n".join(lines) + "\n"


def _plot(costs: list[BatchCost], path: Path) -> None:
    """Milliseconds over batch size, both logarithmic: a flat line costs nothing more, a diagonal one saves nothing."""
    figure = figure_class()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, count in dict.fromkeys((cost.kind, cost.threads) for cost in costs):
        points = [(c.batch, c.median_s * 1e3) for c in costs if (c.kind, c.threads) == (kind, count)]
        style = "-" if count == 1 else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=f"{kind}, {count} thread{'s' * (count > 1)}")
    axes.set(xscale="log", yscale="log", xlabel="queries in one search", ylabel="milliseconds (median)")
    axes.set_xticks(sorted({cost.batch for cost in costs}), labels=sorted({str(c.batch) for c in costs}, key=int))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
