"""The command line: `ralmspec ask`, `compare`, `verify-lossless`."""

import contextlib
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ralmspec.retrievers.errors import RalmspecError
from ralmspec.stages.arrangement import Arrangement
from ralmspec.stages.in_context import InContext
from ralmspec.stages.messages import Committed
from ralmspec.stages.sampling import Sampling
from ralmspec.stages.stride import OS3, StrideSettings

from . import chrome_trace, compare, lossless
from .arrangements import Asynchronous, Sequential, Synchronous, published
from .engine import Engine, EngineOptions, choose_questions, open_engine
from .options import (
    ConcurrencyOption,
    CorpusOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    EncoderOption,
    IndexThreadsOption,
    JsonOption,
    LatencyOption,
    ModelOption,
    NewTokensOption,
    SeedOption,
    SetsOption,
    TemperatureOption,
    ThreadsOption,
)
from .overlap import overlap_efficiency
from .pipeline import Pipeline
from .reports import Comparison, environment
from .tables import comparison_table
from .transcript import Transcript

app = typer.Typer(
    help="Iterative retrieval-augmented generation, served with speculation: same output, lower latency.\n\n"
    "Every command needs a model (a folder or a hub id) and a data folder that holds passages_NAME.jsonl[.gz], "
    "embeddings_NAME_*.npy and, for measuring, questions_SET.jsonl[.gz].",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
if not out.is_terminal:
    out.width = 120  # room for the tables in files and logs
err = Console(stderr=True)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    model: ModelOption,
    data: DataOption,
    corpus: CorpusOption = "wikipedia",
    encoder: EncoderOption = "minilm",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    model_threads: ThreadsOption = 1,
    index_threads: IndexThreadsOption = 1,
    max_new_tokens: NewTokensOption = 128,
    stride: Annotated[str, typer.Option(help="Speculation stride: a number, or 'os3' for the scheduler.")] = "os3",
    prefetch: Annotated[int, typer.Option(min=1, help="Documents that every search brings.")] = 20,
    asynchronous: Annotated[bool, typer.Option("--async/--sync", help="Verify beside decoding, or between.")] = True,
    sequential: Annotated[bool, typer.Option("--sequential", help="Do not speculate at all.")] = False,
    drafts: Annotated[
        bool, typer.Option("--drafts", help="On a terminal, also show drafts (dim) and what is retracted (struck out).")
    ] = False,
    sources: Annotated[bool, typer.Option("--sources", help="List the documents at the end.")] = False,
    retriever_latency: LatencyOption = 0.0,
    retriever_concurrency: ConcurrencyOption = 1,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
) -> None:
    """Answer one question, streaming verified text as it is committed."""
    kind = Asynchronous if asynchronous else Synchronous
    arrangement = Sequential() if sequential else kind(speculation_stride=_stride(stride), prefetch=prefetch)
    options = EngineOptions(
        model=model,
        data=data,
        corpus=corpus,
        encoder=encoder,
        dtype=dtype,
        device=device,
        model_threads=model_threads,
        index_threads=index_threads,
        latency_s=retriever_latency,
        latency_concurrency=retriever_concurrency,
    )

    async def main() -> None:
        engine = _open(options)
        pipeline = Pipeline(model=engine.model, retriever=engine.retriever, speculation=arrangement)
        sampling = Sampling(temperature=temperature, seed=seed)
        transcript = Transcript()
        async with (
            pipeline,
            pipeline.session(question, max_new_tokens=max_new_tokens, sampling=sampling, drafts=drafts) as session,
        ):
            if drafts and out.is_terminal:
                with Live(transcript, console=out, auto_refresh=False, vertical_overflow="visible") as live:
                    async for event in session:
                        transcript.show(event)
                        live.update(transcript, refresh=True)
            else:  # what is committed is never taken back, so it can go to a file or another program at once
                async for event in session:
                    transcript.show(event)
                    if isinstance(event, Committed):
                        out.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
                out.print()
        s = session.statistics
        out.print(
            f"[dim]{s.new_tokens} tokens in {s.latency_s:.2f} s (first after {s.time_to_first_token_s or 0:.2f} s), "
            f"{s.steps} retrievals in {s.kb_calls} searches, {s.rollbacks} rollbacks; {engine.description}[/dim]",
            highlight=False,
            soft_wrap=True,
        )
        if s.prompt_tokens_cut:
            err.print(f"[yellow]the question was too long: {s.prompt_tokens_cut} tokens were cut on the left[/yellow]")
        if sources:
            for document in transcript.documents.values():
                out.print(f"  \\[{document.id}] {_plain(document.title)}  {document.score:.3f}", highlight=False)

    _run(main)


@app.command("compare")
def compare_command(
    model: ModelOption,
    data: DataOption,
    corpus: CorpusOption = "wikipedia",
    encoder: EncoderOption = "minilm",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    model_threads: ThreadsOption = 1,
    index_threads: IndexThreadsOption = 1,
    max_new_tokens: NewTokensOption = 128,
    sets: SetsOption = "nq",
    questions: Annotated[int, typer.Option(min=1, help="Questions from each set.")] = 10,
    prefetch: Annotated[int, typer.Option(min=1, help="Documents that a search brings in +P and +PSA.")] = 20,
    only: Annotated[str, typer.Option(help="Arrangements to run beside RaLMSeq, with commas; all by default.")] = "",
    retriever_latency: LatencyOption = 0.0,
    retriever_concurrency: ConcurrencyOption = 1,
    pad_to: Annotated[
        int, typer.Option(min=0, help="Pad the index with distractor vectors to this many (labelled).")
    ] = 0,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    json: JsonOption = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the first question's timelines as Chrome trace JSON (opens in Perfetto).")
    ] = None,
) -> None:
    """Serve the same questions with RaLMSeq and the paper's arrangements, and compare.

    Paired and interleaved; every output is compared with RaLMSeq's, and an unexplained difference makes the command
    fail. speed-up: ratio of mean latencies. F_ideal: share of the time that a retriever without cost would take.
    F_miss: the same for one whose only cost is the first search and real misses.
    """
    arrangements = published(prefetch)
    if only:
        _known(names := [name.strip() for name in only.split(",")], arrangements)
        arrangements = {n: a for n, a in arrangements.items() if n == compare.BASELINE or n in names}
    options = EngineOptions(
        model=model,
        data=data,
        corpus=corpus,
        encoder=encoder,
        dtype=dtype,
        device=device,
        model_threads=model_threads,
        index_threads=index_threads,
        latency_s=retriever_latency,
        latency_concurrency=retriever_concurrency,
        pad_to=pad_to,
    )
    runs = compare.Runs(arrangements)
    facts: dict[str, Any] = {"model": model, "dtype": dtype, "device": device, "max_new_tokens": max_new_tokens}
    opened: list[Engine] = []

    async def main() -> None:
        engine = _open(options)
        opened.append(engine)
        chosen = choose_questions(engine.corpus, _sets(engine, sets), questions)
        with err.status("measuring how far two threads overlap on these cores"):
            facts["overlap"] = overlap_efficiency(engine)
        facts["threads"] = {"model": model_threads, "index": index_threads}
        with _progress("comparing", len(chosen) * len(arrangements) + len(arrangements)) as tell:
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
        _run(main)
    finally:  # what was measured before an interruption is still shown and written
        if runs.complete and opened:
            _report(runs, opened[0], facts, sets, json, trace)
    wrong = sum(r.outputs - r.identical - r.explained for r in compare.rows(runs, ""))
    if wrong:
        err.print(f"[red]{wrong} outputs differ from RaLMSeq's, unexplained[/red]")
        raise typer.Exit(1)


@app.command("verify-lossless")
def verify_command(
    model: ModelOption,
    data: DataOption,
    corpus: CorpusOption = "wikipedia",
    encoder: EncoderOption = "minilm",
    dtype: Annotated[
        str,
        typer.Option(
            help="float64: every output must be identical. Else a difference must start at a logged near-tie."
        ),
    ] = "float32",
    device: DeviceOption = "cpu",
    model_threads: ThreadsOption = 1,
    index_threads: IndexThreadsOption = 1,
    max_new_tokens: NewTokensOption = 128,
    sets: SetsOption = "all",
    questions: Annotated[int, typer.Option(min=1, help="Questions from each set.")] = 5,
    strides: Annotated[str, typer.Option(help="Speculation strides, with commas.")] = "1,3,8,os3",
    prefetches: Annotated[str, typer.Option(help="Prefetch widths, with commas.")] = "1,20,256",
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Show that every arrangement gives RaLMSeq's tokens, on real questions, documents by documents.

    Runs strides × prefetch widths × asynchronous on and off. Exits with an error if any output differs unexplained.
    """
    arrangements: dict[str, Arrangement] = {
        f"{'async' if kind is Asynchronous else 'sync'} s={stride.strip()} P={width.strip()}": kind(
            speculation_stride=_stride(stride.strip()), prefetch=_number(width, "--prefetches")
        )
        for kind in (Synchronous, Asynchronous)
        for stride in strides.split(",")
        for width in prefetches.split(",")
    }
    options = EngineOptions(
        model=model,
        data=data,
        corpus=corpus,
        encoder=encoder,
        dtype=dtype,
        device=device,
        model_threads=model_threads,
        index_threads=index_threads,
    )
    tally = lossless.Tally(list(arrangements))
    facts: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "max_new_tokens": max_new_tokens,
        "questions_per_set": questions,
    }

    async def main() -> None:
        engine = _open(options)
        names = _sets(engine, sets)
        chosen = choose_questions(engine.corpus, names, questions)
        facts.update(sets=names, retriever=engine.description, temperature=temperature)
        with _progress("verifying", len(chosen) * (len(arrangements) + 1)) as tell:
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
        _run(main)
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
                out.print(
                    f"  {case.arrangement}, token {case.position}, gap {case.gap:.2e} "
                    f"(tolerance {case.tolerance:g}): {_plain(case.question)}",
                    highlight=False,
                )
    if tally.outputs != tally.identical + tally.explained:
        raise typer.Exit(1)


def _open(options: EngineOptions) -> Engine:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with err.status("loading model and index"):
        return open_engine(options)


def _run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run on uvloop where it is installed; turn errors into a sentence and an exit code."""
    try:
        import uvloop  # noqa: F401

        backend: dict[str, Any] = {"use_uvloop": True}
    except ImportError:
        backend = {}
    try:
        anyio.run(main, backend_options=backend)
    except RalmspecError as error:
        err.print(f"[red]error:[/red] {_plain(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except ValueError as error:
        err.print(f"[red]error:[/red] {_plain(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err.print("interrupted")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    columns = (
        TextColumn("{task.fields[what]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.description}"),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=total, what=what)

        def tell(text: str) -> None:
            done = bar.tasks[0].description != ""
            bar.update(task, advance=1 if done else 0, description=_plain(text[:60]))

        yield tell


def _report(
    runs: compare.Runs, engine: Engine, facts: dict[str, Any], sets: str, json: Path | None, trace: Path | None
) -> None:
    rows = compare.rows(runs, engine.description)
    baseline = [answer.statistics for answer in runs.answers[compare.BASELINE][: runs.complete]]
    a, b = compare.step_and_search(baseline)
    facts |= {
        "questions": runs.complete,
        "sets": sets,
        "retriever": engine.description,
        "simulated_latency_s": engine.options.latency_s or None,
        "a_s": float(a.mean()),
        "b_s": float(b.mean()),
        "b_over_a": float(b.mean() / a.mean()),
    }
    out.print(comparison_table(rows, facts))
    if json:
        report = Comparison(environment=environment(**facts), rows=rows)
        json.write_text(report.model_dump_json(indent=2) + "\n")
    if trace:
        chrome_trace.write(trace, {name: answers[0].timeline for name, answers in runs.answers.items()})
        err.print(f"timelines of the first question: {trace} (open it in https://ui.perfetto.dev)")


def _sets(engine: Engine, sets: str) -> list[str]:
    return engine.corpus.question_sets() if sets == "all" else [name.strip() for name in sets.split(",")]


def _stride(text: str) -> StrideSettings | int:
    return OS3() if text.lower() == "os3" else _number(text, "stride")


def _number(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{what}: {text!r} is not a number") from None


def _known(names: list[str], arrangements: dict[str, Arrangement]) -> None:
    for name in names:
        if name not in arrangements:
            raise typer.BadParameter(f"--only: {name!r} is not one of {', '.join(arrangements)}")


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
