"""`ralmspec knn tune` and `ralmspec knn perplexity`: is KNN-LM better than the model alone, and with which settings?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from pydantic import ValidationError
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ralmspec.retrievers.datastore import Datastore
from ralmspec.retrievers.errors import BadKnowledge
from ralmspec.retrievers.folder import Tell
from ralmspec.retrievers.vectors import Memory
from ralmspec.retrievers.windows import Windows
from ralmspec.stages.knn_lm import KnnLM

from .engine import Engine, SearchingOptions
from .knn_engine import KnnOptions, open_knn_engine
from .mixture import Perplexities, mixture, tuned
from .options import JsonOption, with_options
from .perplexity import LEAST, Text, TextModel, bits_per_byte, gather, perplexity
from .reports import environment
from .terminal import ends_in_a_sentence, err, number, out
from .thread_budget import cores

NEIGHBOURS = (1, 8, 64, 256, 1024)
Settings = dict[int, tuple[float, float]]
"""Interpolation and temperature for numbers of neighbours."""

_DEFAULT: dict[str, Any] = {field.name: field.default for field in fields(KnnLM)}

TextArgument = Annotated[
    Path, typer.Argument(help="Held-out text in UTF-8, .txt or .txt.gz; not one that the datastore was made from.")
]
TokensOption = Annotated[
    int, typer.Option("--tokens", min=LEAST, help="Tokens of it that are evaluated, spread over all of it.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions(SearchingOptions):
    """A datastore, and how it is searched: in large batches, which memory as float32 makes several times as fast."""

    datastore: Path
    memory: Memory = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityOptions(TuneOptions):
    """And the mixture's settings."""

    interpolation: float = _DEFAULT["interpolation"]
    temperature: float = _DEFAULT["temperature"]


@with_options(TuneOptions)
def tune_command(
    engine_options: TuneOptions,
    text: TextArgument,
    tokens: TokensOption = 5000,
    top_k_max: Annotated[int, typer.Option(min=1, help="The most neighbours to tune for.")] = 1024,
    json: JsonOption = None,
) -> None:
    """Find the interpolation and the temperature of least perplexity on TEXT, for 1, 8, 64, 256 and 1024 neighbours.

    One pass over the text judges all of them. Settings look a little better on the text they were tuned on than on
    another, where `knn perplexity --settings FILE`, with the file that --json writes, measures them.
    """
    counts = [count for count in NEIGHBOURS if count < top_k_max] + [top_k_max]
    with ends_in_a_sentence():
        engine = _open(engine_options, counts[-1])
        counts = [count for count in counts if count <= len(engine.index)]
        measured = _Measured(engine, text, tokens, counts[-1])
        with err.status("tuning"):
            chosen = {count: tuned(measured.evidence, count) for count in counts}
        report = measured.report(chosen)
    _show(report, "tuned", json)
    best = report.best
    out.print(
        f"use --top-k {best.top_k} --interpolation {best.interpolation:g} --temperature {best.temperature:g}",
        highlight=False,
        soft_wrap=True,
    )
    _warn(report)


@with_options(PerplexityOptions)
def perplexity_command(
    engine_options: PerplexityOptions,
    text: TextArgument,
    tokens: TokensOption = 5000,
    top_k: Annotated[
        str,
        typer.Option(
            help="Neighbours, with commas; by default 1,8,64,256,1024, or those in --settings.", show_default=False
        ),
    ] = "",
    settings: Annotated[
        Path | None,
        typer.Option(
            help="Interpolation and temperature for each number of neighbours, as `knn tune --json` wrote them.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Compare the perplexity of TEXT under KNN-LM with that under the model alone, on the same tokens.

    Interpolation and temperature are the same for every number of neighbours, or come from --settings. The interval is
    the ratio's, 95 %, paired.
    """
    with ends_in_a_sentence():
        chosen = _settings(engine_options, [_count(typed) for typed in top_k.split(",")] if top_k else [], settings)
        engine = _open(engine_options, most := max(chosen))
        if most > (entries := len(engine.index)):
            if top_k or settings:
                raise ValueError(f"--top-k {most}: the datastore has only {entries:,} entries")
            chosen = {count: same for count, same in chosen.items() if count <= entries}
        report = _Measured(engine, text, tokens, max(chosen)).report(chosen)
    _show(report, "measured", json)
    _warn(report)


def _count(typed: str) -> int:
    if (count := number(typed, "--top-k")) < 1:
        raise typer.BadParameter(f"--top-k: {count} is no number of neighbours")
    return count


def _settings(options: PerplexityOptions, counts: list[int], path: Path | None) -> Settings:
    """Interpolation and temperature for each number of neighbours."""
    same = options.interpolation, options.temperature
    if path is None:
        return dict.fromkeys(counts or NEIGHBOURS, same)
    if same != (_DEFAULT["interpolation"], _DEFAULT["temperature"]):
        raise typer.BadParameter("give --settings, or --interpolation and --temperature, not both")
    try:
        mixtures = Perplexities.model_validate_json(path.read_bytes()).mixtures
    except (OSError, ValidationError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise BadKnowledge(f"{path}: is no file that `knn tune --json` wrote ({detail})") from None
    held = {one.top_k: (one.interpolation, one.temperature) for one in mixtures}
    if not held or (unknown := set(counts) - held.keys()):
        lacking = f"for {min(unknown)} neighbours, only for {', '.join(map(str, held))}" if held else "at all"
        raise BadKnowledge(f"{path}: holds no settings {lacking}; tune again")
    return {count: held[count] for count in counts or held}


def _open(options: TuneOptions, most: int) -> Engine:
    """The model does not run beside the searches here, so these get every core, if nothing else is said."""
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    given["index_threads"] = options.index_threads or cores()
    with err.status("loading model and datastore"):
        return open_knn_engine(KnnOptions(**given, top_k=most))


class _Measured:
    """A text, once read and searched for; blocking, and shows how far it is."""

    def __init__(self, engine: Engine, path: Path, tokens: int, most: int) -> None:
        model = cast(TextModel, engine.model)
        datastore = cast(Datastore, cast(KnnLM, engine.workload).datastore)  # open_knn_engine opens these
        with err.status(f"reading {escape(path.name)}"):
            self._text = Text.read(path, model)
        facts = datastore.manifest.parts["keys"]
        windows = Windows(
            self._text.tokens[:-1], window=facts["window"], context=facts["context"], start=model.start_tokens
        )
        with _progress() as tell:
            self.evidence = gather(
                model,
                engine.retriever,
                datastore.values,
                self._text.tokens,
                windows,
                positions=tokens,
                top_k=most,
                tell=tell,
            )
        measured = {
            "text": path.name,
            "tokens": len(self.evidence.log_p),
            "tokens_of_text": len(self._text.tokens),
            "bytes_per_token": self._text.bytes_per_token,
            "retriever_description": engine.description,
            **windows.facts,
        }
        self._facts = engine.options.facts() | measured

    def report(self, settings: Settings) -> Perplexities:
        """These settings on it, by the number of neighbours."""
        log_p = self.evidence.log_p
        return Perplexities(
            environment=environment(**self._facts),
            perplexity=perplexity(log_p),
            bits_per_byte=bits_per_byte(log_p, self._text),
            mixtures=[
                mixture(self.evidence, self._text, top_k=count, interpolation=share, temperature=temperature)
                for count, (share, temperature) in settings.items()
            ],
        )


def _show(report: Perplexities, what: str, json: Path | None) -> None:
    facts = report.environment
    table = Table(
        title=f"{what} on {facts['tokens']:,} of {facts['tokens_of_text']:,} tokens of {escape(facts['text'])}",
        caption=f"{facts['retriever_description']}; a token has {facts['bytes_per_token']:.2f} bytes",
    )
    for column in ("neighbours", "interpolation", "temperature", "perplexity", "bits per byte", "ratio", "95 %"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("model alone", "", "", f"{report.perplexity:.2f}", f"{report.bits_per_byte:.4f}", "", "")
    for one in report.mixtures:
        short = f" ({one.neighbours:.0f} found)" if one.neighbours < 0.995 * one.top_k else ""
        table.add_row(
            f"{one.top_k}{short}",
            f"{one.interpolation:g}",
            f"{one.temperature:g}" if one.top_k > 1 else "any",
            f"{one.perplexity:.2f}",
            f"{one.bits_per_byte:.4f}",
            f"{one.ratio:.4f}",
            f"{one.ratio_low:.4f}-{one.ratio_high:.4f}",
        )
    out.print(table)
    if json:
        json.write_text(report.model_dump_json(indent=2) + "\n")


def _warn(report: Perplexities) -> None:
    """Say so where KNN-LM is not better."""
    for one in report.mixtures:
        if one.ratio_high >= 1:
            what = "WORSE than" if one.ratio > 1 else "not certainly better than"
            err.print(f"[bold yellow]with {one.top_k} neighbours KNN-LM is {what} the model alone[/bold yellow]")
    if all(one.ratio >= 1 for one in report.mixtures):
        err.print(
            "[yellow]tune the settings (`ralmspec knn tune`); if that does not help, the datastore's texts are of "
            "another kind, or too few[/yellow]"
        )


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar on stderr for each part, with its rate and the time left."""
    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,} tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, speed_estimate_period=120) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(part: str, done: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = bar.add_task(part, total=total, rate="")
            speed = bar.tasks[tasks[part]].speed
            bar.update(tasks[part], completed=done, rate=f"{speed:,.0f}/s" if speed else "")

        yield tell
