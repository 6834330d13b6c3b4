"""The parts of an index folder, and how each is made: passages, vectors, and one for every kind of retriever."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .dense_parts import DenseOptions, dense_parts
from .errors import BadKnowledge
from .folder import Part, Progress, read_json, write_json
from .lines import lines
from .passages import Passages
from .vectors import DTYPES, Memory, Vectors, narrow

KINDS = ("exact", "hnsw", "ivf", "bm25", "lucene")
DENSE = frozenset({"exact", "hnsw", "ivf"})

_BM25 = {"k1": 0.9, "b": 0.4}  # the paper's, and Lucene's setting for passages
_EMBEDDED_AT_ONCE = 1024  # passages; what a killed build loses of its vectors is less than this


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions(DenseOptions):
    """What to build. `embeddings` is a .npy file of float16 or float32 with one row a passage, made by `encoder`;
    without it the passages are encoded."""

    kinds: tuple[str, ...] = ("exact",)
    encoder: str = "minilm"
    embeddings: Path | None = None
    lucene_heap_mb: int = 512

    def __post_init__(self) -> None:
        self.check("an index", self.kinds, KINDS)


def parts_of(source: Path, options: BuildOptions) -> list[Part]:
    """The parts that these options ask for, each after those it needs."""
    wanted = {*options.kinds} | ({"vectors"} if DENSE & {*options.kinds} else set())
    offered = [
        Part("vectors", partial(_vectors, options), resumes=True),
        *dense_parts(options, vectors_of),
        Part("bm25", _bm25),
        Part("lucene", partial(_lucene, options)),
    ]
    return [Part("passages", partial(_passages, source)), *(part for part in offered if part.name in wanted)]


def passages_of(index: Path) -> Passages:
    """The texts of an index, finished or not."""
    return Passages(index / "passages" / "passages.jsonl")


# Passages ----------------------------------------------------------------------------------------------------------


def _passages(source: Path, index: Path, target: Path, progress: Progress) -> dict[str, Any]:
    """A plain copy that can be mapped, every passage numbered by its row; an id of its own is kept as "key"."""
    count, size = 0, source.stat().st_size
    with (target / "passages.jsonl").open("w", encoding="utf-8", newline="\n") as copy:
        for row, record, read in _records(source):
            title, text = record.get("title", ""), record.get("text")
            if not isinstance(text, str) or not isinstance(title, str):
                raise BadKnowledge(f'{source}, line {row + 1}: "text" (and "title", if there is one) must be strings')
            key = {"key": record["id"]} if record.get("id", row) != row else {}
            made = {"id": row, "title": title, "text": text, **key}
            copy.write(json.dumps(made, ensure_ascii=False) + "\n")
            count = row + 1
            if count % 1000 == 0:
                progress(min(read, size), size)
    if count == 0:
        raise BadKnowledge(f"{source}: the file is empty; expected one JSON object a line")
    progress(size, size)
    return {"count": count, "source": source.name}


def _records(source: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    for row, line, read in lines(source):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadKnowledge(f"{source}, line {row + 1}: {error}") from error
        if not isinstance(record, dict):
            raise BadKnowledge(f"{source}, line {row + 1}: expected a JSON object, found {type(record).__name__}")
        yield row, record, read


# Vectors -----------------------------------------------------------------------------------------------------------


def _vectors(options: BuildOptions, index: Path, target: Path, progress: Progress) -> dict[str, Any]:
    """One row a passage, in blocks that are always the same; "done" says how many an earlier run has finished."""
    path, noted = target / "vectors.npy", target / "done"
    with passages_of(index) as passages:
        count = len(passages)
        block, maker, encoder = _blocks(options, passages)
        done = read_json(noted) if noted.exists() else {}
        begun = done["passages"] if done.get("maker") == maker else 0
        mode: Literal["r+", "w+"] = "r+" if begun else "w+"
        rows = np.lib.format.open_memmap(path, mode, DTYPES[options.storage], (count, encoder["dimension"]))
        for start in range(begun, count, _EMBEDDED_AT_ONCE):
            stop = min(start + _EMBEDDED_AT_ONCE, count)
            rows[start:stop] = narrow(block(start, stop), options.storage)
            rows.flush()
            write_json(noted, {"passages": stop, "maker": maker})
            progress(stop, count)
    noted.unlink()
    source = options.embeddings.name if options.embeddings is not None else "encoded here"
    return {"storage": options.storage, "source": source, "encoder": encoder}


def _blocks(
    options: BuildOptions, passages: Passages
) -> tuple[Callable[[int, int], NDArray[np.float32]], str, dict[str, Any]]:
    """Where vectors come from: passages from a first to a last as float32; a checksum of that; facts of the encoder."""
    from .encoder import open_encoder, open_passage_encoder

    if options.embeddings is not None:
        named = open_encoder(options.encoder, device=options.device)
        given = Vectors.open(options.embeddings, count=len(passages), dimension=named.dimension)
        facts = {"name": named.name, "dimension": named.dimension, "fingerprint": named.fingerprint()}
        return given.block, "given", facts
    encoder = open_passage_encoder(options.encoder, device=options.device)

    def encoded(start: int, stop: int) -> NDArray[np.float32]:
        return encoder.encode_passages([passages[row] for row in range(start, stop)])

    facts = {"name": encoder.name, "dimension": encoder.dimension, "fingerprint": encoder.fingerprint()}
    return encoded, encoder.passage_fingerprint(), facts


def vectors_of(index: Path, memory: Memory = "map") -> Vectors:
    """The vectors of an index, finished or not."""
    return Vectors.open(index / "vectors" / "vectors.npy", memory=memory)


# Kinds -------------------------------------------------------------------------------------------------------------


def _bm25(index: Path, target: Path, progress: Progress) -> dict[str, Any]:
    from .bm25 import BM25

    with passages_of(index) as passages:
        BM25.build(passages, target, **_BM25, tell=progress, total=len(passages))
    return {**_BM25}


def _lucene(options: BuildOptions, index: Path, target: Path, progress: Progress) -> dict[str, Any]:
    from .lucene import Lucene

    with passages_of(index) as passages:
        Lucene.build(passages, target, heap_mb=options.lucene_heap_mb, tell=progress, total=len(passages))
    return {"analyzer": "English"}  # k1 and b belong to the search
