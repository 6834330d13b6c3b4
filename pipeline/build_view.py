"""What the commands that build a folder share: options, progress, how to go on, and what was built."""

from collections.abc import Iterator
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

from ralmspec.retrievers.folder import BYTES, Tell
from ralmspec.retrievers.manifest import Content, Manifest

from .terminal import ends_in_a_sentence, err, out

HnswMOption = Annotated[int, typer.Option(min=2, help="HNSW: neighbours of a vector.")]
HnswEfOption = Annotated[int, typer.Option(min=1, help="HNSW: candidates looked at for each.")]
IvfListsOption = Annotated[int, typer.Option(min=0, help="IVF: lists; 0 for four times the root of the vectors.")]
ThreadsOption = Annotated[
    int,
    typer.Option(
        min=1, help="Cores for the model and for graphs. HNSW graphs built with more than one differ from run to run."
    ),
]
BuildSeedOption = Annotated[int, typer.Option(help="Seed of everything random in it.")]

_DOCUMENTS: dict[Content, str] = {"index": "passages", "datastore": "entries"}


def split(typed: str) -> tuple[str, ...]:
    """Names as typed, with commas between them."""
    return tuple(name.strip() for name in typed.split(",") if name.strip())


@contextmanager
def building(content: Content) -> Iterator[Tell]:
    """A bar on stderr for each part, with its rate; call what is yielded as builders do. Ctrl-C says how to go on."""
    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    try:
        with Progress(*columns, console=err) as bar:

            def tell(part: str, done: int, total: int) -> None:
                if part not in tasks:
                    tasks[part] = bar.add_task(part, total=total, completed=done, rate="")
                task = bar.tasks[tasks[part]]
                scale, unit = (1e6, "MB") if part in BYTES else (1.0, _DOCUMENTS[content])
                rate = f"{task.speed / scale:,.0f} {unit}/s" if task.speed else ""
                bar.update(tasks[part], completed=done, total=total, rate=rate)

            yield tell
    except KeyboardInterrupt:
        err.print("what is done is kept: give the same command again to go on")
        raise


def table(manifest: Manifest, folder: Path) -> Table:
    """What a folder holds, part by part, and what each was made with."""
    documents = f"{manifest.documents:,} {_DOCUMENTS[manifest.content]}"
    made = Table(title=f"{escape(str(folder))}: {documents}, built {manifest.created}")
    for column in ("part", "MB", "files", "made with"):
        made.add_column(column, justify="right" if column in ("MB", "files") else "left")
    for part, facts in manifest.parts.items():
        files = [file for file in manifest.files.values() if file.part == part]
        settings = {name: value for name, value in facts.items() if name != "count"}
        if part in ("vectors", "keys") and manifest.encoder is not None:
            maker = "encoder" if part == "vectors" else "model"
            settings = {maker: manifest.encoder.name, "dimension": manifest.encoder.dimension, **settings}
        lists = {name: ", ".join(map(str, value)) for name, value in settings.items() if isinstance(value, list)}
        made_with = ", ".join(f"{name} {value}" for name, value in {**settings, **lists}.items())
        made.add_row(part, f"{sum(file.bytes for file in files) / 1e6:,.1f}", str(len(files)), escape(made_with))
    return made


def show(folder: Path, content: Content, *, check: bool, json: bool) -> None:
    """Print what a folder holds; with `check`, only if every file is still the one that was built."""
    with ends_in_a_sentence():
        manifest = Manifest.read(folder, content)
        if check:
            manifest.check(folder, manifest.parts)
    if json:
        out.print_json(manifest.model_dump_json())
        return
    out.print(table(manifest, folder))
    if check:
        out.print("[green]every file is the one that was built[/green]")
