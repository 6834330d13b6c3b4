"""`ralmspec index`: build an index folder from passages, and say what is in one."""

from pathlib import Path
from typing import Annotated

import typer

from ralmspec.retrievers.index_build import build_index
from ralmspec.retrievers.index_parts import DENSE, KINDS, BuildOptions
from ralmspec.retrievers.vectors import Kind

from .build_view import (
    BuildSeedOption,
    HnswEfOption,
    HnswMOption,
    IvfListsOption,
    ThreadsOption,
    building,
    show,
    split,
    table,
)
from .terminal import ends_in_a_sentence, out
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
    threads: ThreadsOption = _DEFAULT.threads,
    hnsw_m: HnswMOption = _DEFAULT.hnsw_m,
    hnsw_ef_construction: HnswEfOption = _DEFAULT.hnsw_ef_construction,
    ivf_lists: IvfListsOption = _DEFAULT.ivf_lists,
    lucene_heap_mb: Annotated[
        int, typer.Option(min=64, help="Lucene: memory of the Java machine.")
    ] = _DEFAULT.lucene_heap_mb,
    seed: BuildSeedOption = _DEFAULT.seed,
) -> None:
    """Build FOLDER from PASSAGES, streaming.

    The folder appears when all of it is done. A build that was interrupted goes on where it was when the same command
    is given again.
    """
    with ends_in_a_sentence():
        options = BuildOptions(
            kinds=split(kinds),
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
        with building("index") as tell:
            manifest = build_index(passages, folder, options, tell=tell)
    out.print(table(manifest, folder))


@app.command("info")
def info(
    folder: Annotated[Path, typer.Argument(help="An index folder.")],
    check: Annotated[bool, typer.Option("--check", help="Also read every file and compare its checksum.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Say what an index folder holds and how it was made; with --check, whether it is still what was built."""
    show(folder, "index", check=check, json=json)
