"""A KNN-LM datastore: the tokens of a text, each with the model's state before it, and retrievers over these states."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from .base import Document, Retriever
from .errors import BadKnowledge, RetrieverFailed
from .index import SearchOptions, dense_retriever
from .manifest import METRICS, Manifest
from .vectors import Memory, Vectors

KINDS = ("exact", "hnsw", "ivf")
_SHOWN = 32  # tokens of left context in a document's text


class Datastore:
    """A text's tokens in their order, and the model's state before each: what KNN-LM finds its neighbours among.

    Made by `open`, never changed; any thread may use it.

    `tokens`       int32 [n + 1], mapped: the text. Entry i is the token i + 1, and its key the state after token i.
    `values`       int32 [n], a view: the token of each entry
    `keys`         the keys, [n, dimension], compared by squared L2 distance
    `dimension`    width of a key
    `fingerprint`  of the model that made them: queries must be states of a model with the same
    `vocabulary`   tokens are 0 to this, without it
    `manifest`     how it was made
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        tokens: NDArray[np.int32],
        keys: Vectors,
        decode: Callable[[Sequence[int]], str] | None,
    ) -> None:
        facts = manifest.encoder
        if facts is None:
            raise BadKnowledge(f"{folder}: its manifest names no model for its keys; build the datastore again")
        self.manifest = manifest
        self.tokens = tokens
        self.values = tokens[1:]
        self.keys = keys
        self.dimension = facts.dimension
        self.fingerprint = facts.fingerprint
        self.vocabulary = int(manifest.parts["tokens"]["vocabulary"])
        self._folder = folder
        self._decode = decode

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        memory: Memory = "map",
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> "Datastore":
        """The datastore that `ralmspec knn build` made, with the files of tokens and keys checked first.

        `memory` says where keys are searched, see `Vectors.open`; `decode`, thread-safe, makes text of tokens, for
        people: without it documents show their numbers. Raises `BadKnowledge` naming the file that is missing, altered
        or foreign. Blocking: reads tokens and keys, which takes some seconds for gigabytes.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder, "datastore")
        manifest.check(folder, {"tokens", "keys"})
        tokens, count = tokens_of(folder), manifest.documents
        width = manifest.encoder.dimension if manifest.encoder else None
        if len(tokens) != count + 1:
            raise BadKnowledge(f"{folder}: has {len(tokens)} tokens, but {count} entries; build the datastore again")
        return cls(folder, manifest, tokens, keys_of(folder, memory, count=count, dimension=width), decode)

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.values)

    def retriever(self, kind: str = "exact", options: SearchOptions | None = None) -> Retriever:
        """A retriever of entries by their keys: "exact", or one that was built, "hnsw" or "ivf"; its file is checked
        first.

        Scores are minus squared distances. Queries must come with their vector, a frontier's key; a text alone raises
        `RetrieverFailed`. A document is an entry: its text is the 32 tokens before it, and the token. Retrievers share
        this datastore's keys, so `options.memory` is not looked at. Raises `BadKnowledge`.
        """
        if kind not in KINDS:
            raise BadKnowledge(f"{self._folder}: a datastore is searched by {', '.join(KINDS)}, not {kind!r}")
        if kind not in self.manifest.kinds:
            raise BadKnowledge(f"{self._folder}: was built without {kind}; it has {', '.join(self.manifest.kinds)}")
        self.manifest.check(self._folder, {kind} - {"exact"})
        entries, states = _Entries(self.tokens, self._decode), _States(self.dimension)
        return dense_retriever(kind, self._folder, entries, self.keys, states, options or SearchOptions())


def tokens_of(folder: Path) -> NDArray[np.int32]:
    """The tokens of a datastore, finished or not: mapped, int32 [n + 1]."""
    path = folder / "tokens" / "tokens.npy"
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadKnowledge(f"{path}: cannot be read ({error}); build the datastore again") from error
    if not isinstance(tokens, np.ndarray) or tokens.dtype != np.int32 or tokens.ndim != 1:
        raise BadKnowledge(f"{path}: is no row of int32; build the datastore again")
    return np.asarray(tokens)


def keys_of(folder: Path, memory: Memory = "map", *, count: int | None = None, dimension: int | None = None) -> Vectors:
    """The keys of a datastore, finished or not."""
    path = folder / "keys" / "keys.npy"
    return Vectors.open(path, memory=memory, metric=METRICS["datastore"], count=count, dimension=dimension)


class _Entries(Sequence[Document]):
    """Entries as documents, made when they are asked for."""

    def __init__(self, tokens: NDArray[np.int32], decode: Callable[[Sequence[int]], str] | None) -> None:
        self._tokens = tokens
        self._text = decode or (lambda tokens: " ".join(map(str, tokens)))

    def __len__(self) -> int:
        return len(self._tokens) - 1

    @overload
    def __getitem__(self, id: int) -> Document: ...
    @overload
    def __getitem__(self, id: slice) -> list[Document]: ...
    def __getitem__(self, id: int | slice) -> Document | list[Document]:
        if isinstance(id, slice):
            return [self[one] for one in range(len(self))[id]]
        if not 0 <= id < len(self):
            raise BadKnowledge(f"there is no entry {id}; the datastore has 0 to {len(self) - 1}")
        context, value = self._tokens[max(0, id + 1 - _SHOWN) : id + 1].tolist(), self._tokens[id + 1 : id + 2].tolist()
        return Document(id, f"entry {id:,}", f"{self._text(context)} → {self._text(value)}")


class _States:
    """Stands where dense retrievers have a query encoder: a hidden state cannot be made from a text alone."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Refuses any text."""
        if texts:
            raise RetrieverFailed(
                f"{len(texts)} queries to a datastore came as text alone ({texts[0]!r}); "
                "entries are found by the model's hidden state, so a query needs its vector: a frontier's key"
            )
        return np.empty((0, self.dimension), dtype=np.float32)
