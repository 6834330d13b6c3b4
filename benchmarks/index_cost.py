"""What building an index costs, kind by kind: time, peak memory and size.

    python benchmarks/index_cost.py                 the demo's 6,000 passages
    python benchmarks/index_cost.py --data DIR --encode 1000 --out index_cost.md

Every kind is built alone, in a process of its own. `vectors` is what all dense kinds share, once from stored embeddings
and, with --encode N, once from the text of the first N passages; the time for all of them is then extrapolated.
"""

import gzip
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ralmspec.pipeline.reports import environment
from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.manifest import Manifest

DEMO = Path(__file__).parent.parent / "examples" / "demo"
KINDS = ("exact", "hnsw", "ivf", "bm25", "lucene")


@dataclass(frozen=True, slots=True)
class Cost:
    """`seconds` and `peak_mb` are those of the whole process, start and checksums included; `size_mb` of its part."""

    what: str
    seconds: float
    peak_mb: float
    size_mb: float


def build(passages: Path, folder: Path, arguments: Sequence[str]) -> tuple[float, float, Manifest]:
    """Seconds, peak resident megabytes, and the manifest of what one `ralmspec index build` has made."""
    command = [sys.executable, "-c", "from ralmspec.pipeline.cli import app; app()", "index", "build"]
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        actions = [(os.POSIX_SPAWN_DUP2, nowhere.fileno(), stream) for stream in (1, 2)]
        child = os.posix_spawn(
            sys.executable, [*command, str(passages), str(folder), *arguments], os.environ, file_actions=actions
        )
        _, status, usage = os.wait4(child, 0)
    if status != 0:
        raise SystemExit(f"ralmspec index build {' '.join(arguments)} failed; run it to see why")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, Manifest.read(folder)


def costs(corpus: Corpus, encode: int, work: Path) -> Iterator[Cost]:
    """One after the other."""
    for kind in KINDS:
        seconds, peak, manifest = build(
            corpus.passages, work / kind, ["--kinds", kind, "--embeddings", str(corpus.embeddings)]
        )
        part = "vectors" if kind == "exact" else kind
        yield Cost(kind if kind != "exact" else "exact, stored embeddings", seconds, peak, size(manifest, part))
    if encode:
        subset = work / "subset.jsonl"
        unpack = gzip.open if corpus.passages.suffix == ".gz" else open
        with unpack(corpus.passages, "rt") as lines, subset.open("w") as copy:
            copy.writelines(islice(lines, encode))
        seconds, peak, manifest = build(subset, work / "encoded", ["--kinds", "exact"])
        yield Cost(f"exact, text of {manifest.documents:,} passages", seconds, peak, size(manifest, "vectors"))


def size(manifest: Manifest, part: str) -> float:
    """Megabytes of a part's files."""
    return sum(file.bytes for file in manifest.files.values() if file.part == part) / 1e6


def main(
    data: Annotated[Path, typer.Option(help="Folder with passages and embeddings.")] = DEMO,
    encode: Annotated[int, typer.Option(min=0, help="Also encode the text of so many passages.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the table, in Markdown.")] = None,
) -> None:
    """Measure what building each kind of index costs."""
    corpus = Corpus.find(data)
    console = Console()
    lines = ["| built | seconds | peak memory MB | size MB |", "|---|---|---|---|"]
    total = 0
    with tempfile.TemporaryDirectory() as work:
        for cost in costs(corpus, encode, Path(work)):
            lines.append(f"| {cost.what} | {cost.seconds:.0f} | {cost.peak_mb:.0f} | {cost.size_mb:.1f} |")
            console.print(lines[-1], highlight=False)
            last = cost
        total = Manifest.read(Path(work) / "exact").documents
    if encode:
        hours = last.seconds * total / encode / 3600
        lines += ["", f"*Extrapolated*, not measured: {total:,} passages from text would take {hours:.1f} hours."]
    facts = environment()
    lines = [f"{total:,} passages, {facts['machine']}, {facts['date']}, one thread. `{facts['command']}`", "", *lines]
    if out is not None:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
