"""Builds an index folder from passages; one that was killed goes on where it was."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import BadKnowledge
from .folder import Tell, build_folder
from .index_parts import BuildOptions, parts_of
from .manifest import FileFacts, Manifest


def build_index(
    source: str | Path,
    folder: str | Path,
    options: BuildOptions,
    *,
    tell: Tell = lambda part, done, total: None,
) -> Manifest:
    """Make `folder` from the passages in `source`: `.jsonl` or `.jsonl.gz`, each with "text", maybe "title" and "id".

    `build_folder` says how, and what happens after an interruption: every finished part is kept, and vectors and the
    HNSW graph go on where they were. Texts are streamed, and so are the vectors while they are made; HNSW and IVF hold
    them in memory while they are built, bm25 its postings. Blocking.

    Raises as `build_folder` does, `BadKnowledge` for passages that cannot be served, and `MissingExtra` for a kind
    whose package is not installed.
    """
    source, folder, given = Path(source), Path(folder), options.embeddings

    def plan() -> dict[str, Any]:
        return asdict(options) | ({} if given is None else {"embeddings": FileFacts.of(given, given.name).sha256})

    if given is not None and not given.is_file():
        raise BadKnowledge(f"{given}: there is no such file; give the passages' vectors as .npy")
    return build_folder(folder, "index", [source], plan=plan, parts=parts_of(source, options), tell=tell)
