"""The parts of an index folder, and how each is made: passages, vectors, and one for every kind of retriever."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import BadKnowledge
from .passages import Passages
from .vectors import DTYPES, Kind, Memory, Vectors, narrow

KINDS = ("exact", "hnsw", "ivf", "bm25", "lucene")
DENSE = frozenset({"exact", "hnsw", "ivf"})

Progress = Callable[[int, int], None]
_BM25 = {"k1": 0.9, "b": 0.4}  # the paper's, and Lucene's setting for passages
_EMBEDDED_AT_ONCE = 1024  # passages; what a killed build loses of its vectors is less than this


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What to build. `embeddings` is a .npy file of float16 or float32 with one row a passage, made by `encoder`;
    without it the passages are encoded. `storage` is what vectors are kept in: "float32", "float16" or "bfloat16"."""

    kinds: tuple[str, ...] = ("exact",)
    encoder: str = "minilm"
    embeddings: Path | None = None
    storage: Kind = "float32"
    device: str = "cpu"
    threads: int = 1
    hnsw_m: int = 32
    hnsw_ef_construction: int = 200
    ivf_lists: int = 0
    """0: about four times the square root of the number of passages."""
    lucene_heap_mb: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kinds: {', '.join(unknown)}; an index can have {', '.join(KINDS)}")
        if not self.kinds:
            raise ValueError(f"kinds: none given; an index can have {', '.join(KINDS)}")
        if self.storage not in DTYPES:
            raise ValueError(f"storage: {self.storage!r}; vectors are kept in {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True)
class Part:
    """`make(index, target, progress)` writes the part into the folder `target`, reading finished parts in `index`, and
    returns what the manifest should say of it. One that `resumes` finds in `target` what an earlier run left there."""

    name: str
    make: Callable[[Path, Path, Progress], dict[str, Any]]
    resumes: bool = False


def parts_of(source: Path, options: BuildOptions) -> list[Part]:
    """The parts that these options ask for, each after those it needs."""
    parts = [Part("passages", partial(_passages, source))]
    makers = {"vectors": _vectors, "hnsw": _hnsw, "ivf": _ivf, "bm25": _bm25, "lucene": _lucene}
    wanted = {*options.kinds} | ({"vectors"} if DENSE & {*options.kinds} else set())
    resuming = ("vectors", "hnsw")
    parts += [Part(n, partial(make, options), n in resuming) for n, make in makers.items() if n in wanted]
    return parts


def passages_of(index: Path) -> Passages:
    """The texts of an index, finished or not."""
    return Passages(index / "passages" / "passages.jsonl")


# Passages ----------------------------------------------------------------------------------------------------------


def _passages(source: Path, index: Path, target: Path, progress: Progress) -> dict[str, Any]:
    """A plain copy that can be mapped, every passage numbered by its row; an id of its own is kept as "key"."""
    count, size = 0, source.stat().st_size
    with source.open("rb") as raw, (target / "passages.jsonl").open("w", encoding="utf-8", newline="\n") as copy:
        for row, record in _records(source, raw):
            title, text = record.get("title", ""), record.get("text")
            if not isinstance(text, str) or not isinstance(title, str):
                raise BadKnowledge(f'{source}, line {row + 1}: "text" (and "title", if there is one) must be strings')
            key = {"key": record["id"]} if record.get("id", row) != row else {}
            made = {"id": row, "title": title, "text": text, **key}
            copy.write(json.dumps(made, ensure_ascii=False) + "\n")
            count = row + 1
            if count % 1000 == 0:
                progress(min(raw.tell(), size), size)
    if count == 0:
        raise BadKnowledge(f"{source}: the file is empty; expected one JSON object a line")
    progress(size, size)
    return {"count": count, "source": source.name}


def _records(source: Path, raw: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = gzip.GzipFile(fileobj=raw) if source.suffix == ".gz" else raw
    row = 0
    try:
        for row, line in enumerate(lines):
            record = json.loads(line)
            if not isinstance(record, dict):
                raise BadKnowledge(f"{source}, line {row + 1}: expected a JSON object, found {type(record).__name__}")
            yield row, record
    except (OSError, EOFError, zlib.error) as error:
        raise BadKnowledge(f"{source}: cannot be unpacked ({error}); fetch or write the file again") from error
    except (ValueError, RecursionError) as error:
        raise BadKnowledge(f"{source}, line {row + 1}: {error}") from error


# Vectors -----------------------------------------------------------------------------------------------------------


def _vectors(options: BuildOptions, index: Path, target: Path, progress: Progress) -> dict[str, Any]:
    """One row a passage, in blocks that are always the same; "done" says how many an earlier run has finished."""
    path, noted = target / "vectors.npy", target / "done"
    with passages_of(index) as passages:
        count = len(passages)
        block, maker, encoder = _blocks(options, passages)
        done = json.loads(noted.read_text()) if noted.exists() else {}
        begun = done["passages"] if done.get("maker") == maker else 0
        mode: Literal["r+", "w+"] = "r+" if begun else "w+"
        rows = np.lib.format.open_memmap(path, mode, DTYPES[options.storage], (count, encoder["dimension"]))
        for start in range(begun, count, _EMBEDDED_AT_ONCE):
            stop = min(start + _EMBEDDED_AT_ONCE, count)
            rows[start:stop] = narrow(block(start, stop), options.storage)
            rows.flush()
            draft = target / "done.new"
            draft.write_text(json.dumps({"passages": stop, "maker": maker}))
            draft.replace(noted)
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


def _hnsw(options: BuildOptions, index: Path, target: Path, progress: Progress) -> dict[str, Any]:
    from .hnsw import HNSWDense

    settings = {"m": options.hnsw_m, "ef_construction": options.hnsw_ef_construction, "seed": options.seed}
    path = target / "graph.faiss"
    HNSWDense.build(vectors_of(index), path, **settings, threads=options.threads, tell=progress)
    return settings


def _ivf(options: BuildOptions, index: Path, target: Path, progress: Progress) -> dict[str, Any]:
    from .ivf import IVFDense

    vectors = vectors_of(index)
    lists = options.ivf_lists or max(1, round(4 * len(vectors) ** 0.5))
    path = target / "lists.faiss"
    IVFDense.build(vectors, path, lists=lists, seed=options.seed, threads=options.threads, tell=progress)
    return {"lists": lists, "seed": options.seed}


def _bm25(options: BuildOptions, index: Path, target: Path, progress: Progress) -> dict[str, Any]:
    from .bm25 import BM25

    with passages_of(index) as passages:
        BM25.build(passages, target, **_BM25, tell=progress, total=len(passages))
    return {**_BM25}


def _lucene(options: BuildOptions, index: Path, target: Path, progress: Progress) -> dict[str, Any]:
    from .lucene import Lucene

    with passages_of(index) as passages:
        Lucene.build(passages, target, heap_mb=options.lucene_heap_mb, tell=progress, total=len(passages))
    return {"analyzer": "English"}  # k1 and b belong to the search
