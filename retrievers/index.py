"""Opens a retriever from an index folder that `ralmspec index build` has made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .base import Document, Retriever
from .encoder import NamedQueryEncoder, QueryEncoder, open_encoder
from .errors import BadKnowledge
from .index_parts import DENSE, KINDS, passages_of, vectors_of
from .manifest import EncoderFacts, Manifest
from .passages import Passages
from .proposals import Scan
from .vectors import Memory, Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How an index is searched; what does not belong to the kind in use is not looked at."""

    threads: int = 1
    memory: Memory = "map"
    """Dense kinds: vectors stay in their file ("map"), or are copied to memory as float32 ("float32") or as they are
    ("copy"). Scores are the same; a copy is searched up to 1.5 times as fast."""
    scan: Scan = "codes"
    """The exact kind: what is scanned. "codes", a copy in memory of one byte a number, made when the index is opened
    and several times as fast; or "stored", the vectors alone. Results are the same."""
    ef_search: int = 256
    """HNSW: candidates held during a search, and the most documents that one can bring."""
    probes: int = 64
    """IVF: lists that a search looks into."""
    depth: int = 256
    """IVF: the most documents that one search can bring."""
    heap_mb: int = 512
    """Lucene: memory of the Java machine."""
    jvm_threads: int = 1
    """Lucene: cores that the Java machine believes to have."""


def open_index(
    folder: str | Path,
    kind: str,
    options: SearchOptions | None = None,
    *,
    encoder: NamedQueryEncoder | None = None,
    device: str = "cpu",
) -> Retriever:
    """The retriever of one kind ("exact", "hnsw", "ivf", "bm25" or "lucene"), with its files checked first.

    The query encoder is the one that the manifest names unless one is given; either way it must be the one that made
    the vectors. Raises `BadKnowledge` naming the file that is missing, altered or foreign, and `MissingExtra`.
    Blocking: reads every file of the kind once.
    """
    folder, options = Path(folder), options or SearchOptions()
    manifest = Manifest.read(folder)
    if kind not in KINDS:
        raise BadKnowledge(f"{folder}: no kind of index is called {kind!r}; there are {', '.join(KINDS)}")
    needed = {"passages"} | ({"vectors"} if kind in DENSE else set()) | ({kind} - {"exact"})
    if lacking := needed - manifest.parts.keys():
        raise BadKnowledge(f"{folder}: was built without {', '.join(sorted(lacking))}, which {kind!r} needs")
    manifest.check(folder, needed)
    passages = passages_of(folder)
    if len(passages) != manifest.documents:
        raise BadKnowledge(f"{passages.path}: holds {len(passages)} passages, the manifest says {manifest.documents}")
    match kind:
        case "bm25":
            from .bm25 import BM25

            return BM25(passages, folder / "bm25")
        case "lucene":
            from .lucene import Lucene

            heap, cores = options.heap_mb, options.jvm_threads
            return Lucene(passages, folder / "lucene", threads=options.threads, heap_mb=heap, jvm_threads=cores)
        case _:
            if manifest.encoder is None:
                raise BadKnowledge(f"{folder}: its manifest names no encoder for its vectors; build the index again")
            encoder = encoder or open_encoder(manifest.encoder.name, device=device)
            _same(encoder, manifest.encoder, folder)
            vectors = vectors_of(folder, memory=options.memory)
            return dense_retriever(kind, folder, passages, vectors, encoder, options)


def dense_retriever(
    kind: str,
    folder: Path,
    documents: Passages | Sequence[Document],
    vectors: Vectors,
    encoder: QueryEncoder,
    options: SearchOptions,
) -> Retriever:
    """The retriever of a dense kind over vectors that are open, by their metric; what was built is in `folder`."""
    threads = options.threads
    match kind:
        case "hnsw":
            from .hnsw import HNSWDense

            graph = folder / "hnsw" / "graph.faiss"
            return HNSWDense(documents, vectors, graph, encoder, ef_search=options.ef_search, threads=threads)
        case "ivf":
            from .ivf import IVFDense

            lists, probes, depth = folder / "ivf" / "lists.faiss", options.probes, options.depth
            return IVFDense(documents, vectors, lists, encoder, probes=probes, depth=depth, threads=threads)
        case _:
            from .dense import ExactDense

            return ExactDense(documents, vectors, encoder, scan=options.scan, threads=threads)


def _same(encoder: NamedQueryEncoder, facts: EncoderFacts, folder: Path) -> None:
    """Vectors of two encoders cannot be compared, even where they are equally long."""
    if (encoder.dimension, encoder.fingerprint()) != (facts.dimension, facts.fingerprint):
        raise BadKnowledge(
            f"{folder}: its vectors were made by {facts.name!r} with other weights than {encoder.name!r} has; "
            "use the one that made them"
        )
