"""`ralmspec knn`: build the datastore of a KNN language model from texts, and say what is in one."""

from pathlib import Path
from typing import Annotated

import typer

from ralmspec.retrievers.datastore import KINDS
from ralmspec.retrievers.datastore_build import DatastoreOptions, build_datastore
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
from .terminal import ends_in_a_sentence, err, out
from .thread_budget import ThreadBudget

app = typer.Typer(help="KNN language models: datastores, their settings, and serving with them.", no_args_is_help=True)
_DEFAULT = DatastoreOptions()


@app.command("build")
def build(
    texts: Annotated[list[Path], typer.Argument(help="Plain texts in UTF-8, .txt or .txt.gz, read in this order.")],
    folder: Annotated[Path, typer.Argument(help="The datastore's folder to make.")],
    model: Annotated[
        str, typer.Option(help="Language model that makes the keys, and later the queries: a folder or a hub id.")
    ],
    kinds: Annotated[str, typer.Option(help=f"Kinds of retriever, with commas: {', '.join(KINDS)}.")] = "exact",
    storage: Annotated[Kind, typer.Option(help="What keys are kept in.")] = _DEFAULT.storage,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens read at once, no more than the model was trained on; by default 512, or all positions.",
            show_default=False,
        ),
    ] = _DEFAULT.window,
    context: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens that stand before each at least, but at the beginning; by default a quarter of the window.",
            show_default=False,
        ),
    ] = _DEFAULT.context,
    batch: Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")] = _DEFAULT.batch,
    max_entries: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many tokens.", show_default=False)
    ] = _DEFAULT.max_entries,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, ...")] = _DEFAULT.device,
    threads: ThreadsOption = _DEFAULT.threads,
    hnsw_m: HnswMOption = _DEFAULT.hnsw_m,
    hnsw_ef_construction: HnswEfOption = _DEFAULT.hnsw_ef_construction,
    ivf_lists: IvfListsOption = _DEFAULT.ivf_lists,
    seed: BuildSeedOption = _DEFAULT.seed,
) -> None:
    """Build a datastore in FOLDER from TEXTS, streaming: an entry for every token of them.

    The folder appears when all of it is done. A build that was interrupted goes on where it was when the same command
    is given again.
    """
    from ralmspec.stages.transformers_model import TransformersModel

    with ends_in_a_sentence():
        options = DatastoreOptions(
            kinds=split(kinds),
            storage=storage,
            window=window,
            context=context,
            batch=batch,
            max_entries=max_entries,
            device=device,
            threads=threads,
            hnsw_m=hnsw_m,
            hnsw_ef_construction=hnsw_ef_construction,
            ivf_lists=ivf_lists,
            seed=seed,
        )
        ThreadBudget(model=threads).apply()
        with err.status("loading the model"):
            loaded = TransformersModel.load(model, device=device)
        with building("datastore") as tell:
            manifest = build_datastore(texts, folder, loaded, options, tell=tell)
    out.print(table(manifest, folder))


@app.command("info")
def info(
    folder: Annotated[Path, typer.Argument(help="A datastore's folder.")],
    check: Annotated[bool, typer.Option("--check", help="Also read every file and compare its checksum.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Say what a datastore holds and how it was made; with --check, whether it is still what was built."""
    show(folder, "datastore", check=check, json=json)
