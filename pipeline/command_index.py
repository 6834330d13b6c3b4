"""`ralmspec index`: build an index folder from passages, and say what is in one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ralmspec.retrievers.index_build import build_index
from ralmspec.retrievers.index_parts import DENSE, KINDS, BuildOptions
from ralmspec.retrievers.manifest import Manifest
from ralmspec.retrievers.vectors import Kind

from .terminal import ends_in_a_sentence, err, out
from .thread_budget import ThreadBudget

app = typer.Typer(help="Build index folders from passages, and look into them.", no_args_is_help=True)
_DEFAULT = BuildOptions()


@app.command("build")
def build(
    passages: Annotated[Path, typer.Argument(help='Passages: .jsonl or .jsonl.gz, each with "text", maybe "title".')],
    folder: Annotated[Path, typer.Argument(help="The index folder to make.")],
    kinds: Annotated[str, typer.Option(help=f"Kinds of retriever, with commas: {', '.join(KINDS)}.")] = "exact,bm25",
    encoder: Annotated[
        str,
        typer.Option(
            help="What makes vectors of passages and, later, of queries: 'minilm', or a sentence-transformers folder "
            "or hub id, or 'dpr:QUESTION,CONTEXT' with two DPR folders or hub ids."
        ),
    ] = _DEFAULT.encoder,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Vectors of the passages, made by this encoder (.npy, a row a passage)."),
    ] = None,
    storage: Annotated[Kind, typer.Option(help="What vectors are kept in.")] = _DEFAULT.storage,
    device: Annotated[str, typer.Option(help="Where passages are encoded: cpu, cuda, ...")] = _DEFAULT.device,
    threads: Annotated[
        int,
        typer.Option(
            min=1,
            help="Cores for encoding and for graphs. HNSW graphs built with more than one differ from run to run.",
        ),
    ] = _DEFAULT.threads,
    hnsw_m: Annotated[int, typer.Option(min=2, help="HNSW: neighbours of a passage.")] = _DEFAULT.hnsw_m,
    hnsw_ef_construction: Annotated[
        int, typer.Option(min=1, help="HNSW: candidates looked at for each.")
    ] = _DEFAULT.hnsw_ef_construction,
    ivf_lists: Annotated[
        int, typer.Option(min=0, help="IVF: lists; 0 for four times the square root of the passages.")
    ] = _DEFAULT.ivf_lists,
    lucene_heap_mb: Annotated[
        int, typer.Option(min=64, help="Lucene: memory of the Java machine.")
    ] = _DEFAULT.lucene_heap_mb,
    seed: Annotated[int, typer.Option(help="Seed of everything random in it.")] = _DEFAULT.seed,
) -> None:
    """Build FOLDER from PASSAGES, streaming.

    The folder appears when all of it is done. A build that was interrupted goes on where it was when the same command
    is given again.
    """
    with ends_in_a_sentence():
        options = BuildOptions(
            kinds=tuple(kind.strip() for kind in kinds.split(",") if kind.strip()),
            encoder=encoder,
            embeddings=embeddings,
            storage=storage,
            device=device,
            threads=threads,
            hnsw_m=hnsw_m,
            hnsw_ef_construction=hnsw_ef_construction,
            ivf_lists=ivf_lists,
            lucene_heap_mb=lucene_heap_mb,
            seed=seed,
        )
        if embeddings is None and DENSE & {*options.kinds}:
            ThreadBudget(model=threads).apply()
        try:
            with _progress() as tell:
                manifest = build_index(passages, folder, options, tell=tell)
        except KeyboardInterrupt:
            err.print("what is done is kept: give the same command again to go on")
            raise
    out.print(_table(manifest, folder))


@app.command("info")
def info(
    folder: Annotated[Path, typer.Argument(help="An index folder.")],
    check: Annotated[bool, typer.Option("--check", help="Also read every file and compare its checksum.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Say what an index folder holds and how it was made; with --check, whether it is still what was built."""
    with ends_in_a_sentence():
        manifest = Manifest.read(folder)
        if check:
            manifest.check(folder, manifest.parts)
    if json:
        out.print_json(manifest.model_dump_json())
        return
    out.print(_table(manifest, folder))
    if check:
        out.print("[green]every file is the one that was built[/green]")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=err) as bar:

        def tell(part: str, done: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = bar.add_task(part, total=total, completed=done, rate="")
            task = bar.tasks[tasks[part]]
            scale, unit = (1e6, "MB/s") if part in ("passages", "checksums") else (1.0, "passages/s")
            rate = f"{task.speed / scale:,.0f} {unit}" if task.speed else ""
            bar.update(tasks[part], completed=done, total=total, rate=rate)

        yield tell


def _table(manifest: Manifest, folder: Path) -> Table:
    table = Table(title=f"{escape(str(folder))}: {manifest.passages:,} passages, built {manifest.created}")
    for column in ("part", "MB", "files", "made with"):
        table.add_column(column, justify="right" if column in ("MB", "files") else "left")
    for part, facts in manifest.parts.items():
        files = [file for file in manifest.files.values() if file.part == part]
        settings = {name: value for name, value in facts.items() if name != "count"}
        if part == "vectors" and manifest.encoder is not None:
            settings = {"encoder": manifest.encoder.name, "dimension": manifest.encoder.dimension, **settings}
        made_with = ", ".join(f"{name} {value}" for name, value in settings.items())
        table.add_row(part, f"{sum(file.bytes for file in files) / 1e6:,.1f}", str(len(files)), escape(made_with))
    return table
