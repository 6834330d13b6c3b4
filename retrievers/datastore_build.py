"""Builds a KNN-LM datastore from texts: each token of them, and the model's state before it."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .datastore import KINDS, keys_of, tokens_of
from .dense_parts import DenseOptions, dense_parts
from .errors import BadKnowledge
from .folder import Part, Progress, Tell, build_folder, read_json, write_json
from .lines import lines
from .manifest import Manifest
from .vectors import DTYPES, Kind, narrow
from .windows import Windows

_CHUNK = 1 << 16  # characters that are made tokens at once


class KeyModel(Protocol):
    """What building needs of a language model."""

    @property
    def name(self) -> str:
        """What it was opened by; the manifest remembers it."""
        ...

    @property
    def key_dimension(self) -> int:
        """Width of a key."""
        ...

    @property
    def context_length(self) -> int:
        """The longest row, in tokens, that `keys` accepts."""
        ...

    @property
    def vocabulary(self) -> int:
        """Tokens are 0 to this, without it."""
        ...

    @property
    def start_tokens(self) -> tuple[int, ...]:
        """What it expects at the beginning of any text."""
        ...

    def fingerprint(self) -> str:
        """A checksum of weights and tokenizer, in hex: only models with the same can search the datastore."""
        ...

    def encode(self, text: str) -> list[int]:
        """Text to tokens, with no special tokens added."""
        ...

    def keys(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """The state after each token of each row, int64 [b, w] -> float32 [b, w, key_dimension]; a row is a text of its
        own. The same call gives the same bits again. Blocking."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DatastoreOptions(DenseOptions):
    """What to build, and how: see `Windows` for `window` and `context`."""

    kinds: tuple[str, ...] = ("exact",)
    storage: Kind = "float16"
    window: int | None = None
    """None: 512, or as many as the model has positions. Windows longer than the texts that a model was trained on give
    poor keys, whatever its positions: with the bundled one, trained on 512, perplexity is 87 at 512 and 122 at 1024."""
    context: int | None = None
    """None: a quarter of the window. More repeats more of the text: half a window takes 1.5 times as long an entry, and
    betters the bundled model's perplexity by 0.2 in 87."""
    batch: int = 4
    """Windows in one forward pass. On a processor more do not help; an accelerator may want them."""
    max_entries: int | None = None

    def __post_init__(self) -> None:
        self.check("a datastore", self.kinds, KINDS)
        for name, least in (("window", 1), ("context", 0), ("batch", 1), ("max_entries", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}: {value}; it must be at least {least}")

    def windows(self, tokens: NDArray[np.int32], model: KeyModel) -> Windows:
        """Over all tokens; `ValueError` if they are longer than the model allows."""
        window = self.window or min(512, model.context_length)
        if window > model.context_length:
            raise ValueError(f"window: {window} tokens, but {model.name} takes at most {model.context_length}")
        return Windows(tokens, window=window, context=self.context, start=model.start_tokens)


def build_datastore(
    texts: Sequence[str | Path],
    folder: str | Path,
    model: KeyModel,
    options: DatastoreOptions,
    *,
    tell: Tell = lambda part, done, total: None,
) -> Manifest:
    """Make `folder` from plain texts, `.txt` or `.txt.gz`, one after another in UTF-8; each line ends with a line feed.

    Entry i is token i + 1 of them, its key the model's state after token i, so n + 1 tokens are n entries and the
    entries after one are its continuation. `build_folder` says how it is made, and what happens after an interruption:
    every finished part is kept, keys go on behind the last finished pass and the HNSW graph where it was. Keys are
    then bit for bit those of a build that was never interrupted. Texts and keys are streamed; HNSW and IVF hold the
    keys in memory while they are built. Blocking.

    Raises as `build_folder` does; `ValueError` for options that do not fit the model; `BadKnowledge` for a model
    without keys, texts that cannot be read or are shorter than two tokens, keys that cannot be kept as they are to be,
    and if an unfinished build's keys are not those that the model gives now.
    """
    if lacking := [name for name in ("keys", "key_dimension", "fingerprint") if not hasattr(model, name)]:
        raise BadKnowledge(
            f"the model ({type(model).__name__}) has no {', '.join(lacking)}: it cannot make a datastore"
        )
    if not texts:
        raise ValueError("texts: none given; a datastore is made from at least one")
    paths, plan = [Path(text) for text in texts], partial(_plan, model, options)
    options.windows(np.zeros(2, dtype=np.int32), model)  # refuses what does not fit before anything is done
    parts = [
        Part("tokens", partial(_tokens, paths, model, options.max_entries)),
        Part("keys", partial(_keys, model, options), resumes=True),
        *(part for part in dense_parts(options, keys_of) if part.name in options.kinds),
    ]
    return build_folder(Path(folder), "datastore", paths, plan=plan, parts=parts, tell=tell)


def _plan(model: KeyModel, options: DatastoreOptions) -> dict[str, Any]:
    return asdict(options) | {"model": model.fingerprint()}


# Tokens ------------------------------------------------------------------------------------------------------------


def text_tokens(
    paths: Sequence[Path], model: KeyModel, progress: Progress = lambda done, total: None
) -> Iterator[NDArray[np.int32]]:
    """The texts as tokens, piece by piece; evaluation must read a text as the datastore's was read.

    Pieces are whole lines, of some 65,000 characters together; the same text is always cut in the same places.
    """
    top = min(model.vocabulary, 1 << 31)
    for path, row, text in _pieces(paths, progress):
        ids = model.encode(text)
        if ids and not 0 <= min(ids) <= max(ids) < top:
            raise BadKnowledge(
                f"{path}, from line {row + 1} on: the tokenizer gives the ids {min(ids)} to {max(ids)}; "
                f"the model knows 0 to {top - 1}, so it belongs to another"
            )
        yield np.array(ids, dtype=np.int32)


def _pieces(paths: Sequence[Path], progress: Progress) -> Iterator[tuple[Path, int, str]]:
    sizes = [path.stat().st_size for path in paths]
    for place, path in enumerate(paths):
        piece, length, first, row = [], 0, 0, -1
        for row, line, read in lines(path):
            try:
                piece.append(line.rstrip(b"\r\n").decode() + "\n")
            except UnicodeDecodeError as error:
                raise BadKnowledge(f"{path}, line {row + 1}: is no text in UTF-8 ({error.reason})") from error
            length += len(piece[-1])
            if length >= _CHUNK:
                yield path, first, "".join(piece)
                piece, length, first = [], 0, row + 1
                progress(min(sum(sizes[:place]) + read, sum(sizes)), sum(sizes))
        if row < 0:
            raise BadKnowledge(f"{path}: the file is empty; expected text")
        yield path, first, "".join(piece)


def _tokens(
    paths: list[Path], model: KeyModel, max_entries: int | None, folder: Path, target: Path, progress: Progress
) -> dict[str, Any]:
    count, size = 0, sum(path.stat().st_size for path in paths)
    bare, path = target / "tokens.bare", target / "tokens.npy"
    with bare.open("wb") as file:
        for ids in text_tokens(paths, model, progress):
            if max_entries is not None:
                ids = ids[: max_entries + 1 - count]
            ids.tofile(file)
            count += len(ids)
            if max_entries is not None and count > max_entries:
                break
    if count < 2:
        names = ", ".join(map(str, paths))
        raise BadKnowledge(f"{names}: {count} tokens in all; a datastore takes at least 2")
    with path.open("wb") as file, bare.open("rb") as content:
        _write_head(file, np.dtype(np.int32), (count,))
        shutil.copyfileobj(content, file)
    bare.unlink()
    progress(size, size)
    return {"count": count - 1, "vocabulary": model.vocabulary, "texts": [path.name for path in paths]}


# Keys --------------------------------------------------------------------------------------------------------------


def _keys(model: KeyModel, options: DatastoreOptions, folder: Path, target: Path, progress: Progress) -> dict[str, Any]:
    """One row an entry, in passes that are always the same; "done" says how many windows an earlier run has finished.

    Written as a file, not mapped: what is mapped and written stays in memory until the system finds time for it.
    """
    path, noted = target / "keys.npy", target / "done"
    tokens = tokens_of(folder)[:-1]
    windows, kind, count = options.windows(tokens, model), options.storage, len(tokens)
    begun = read_json(noted)["windows"] if noted.exists() else 0
    with path.open("r+b" if begun else "w+b") as file:
        head = _write_head(file, DTYPES[kind], (count, model.key_dimension))
        width = model.key_dimension * DTYPES[kind].itemsize
        last = (begun - 1) // options.batch * options.batch  # of the passes that are there: made again, and compared
        for first in range(max(0, last), len(windows), options.batch):
            stop = min(first + options.batch, len(windows))
            made = _made(model, windows, first, stop, kind).tobytes()
            file.seek(head + windows.begins(first) * width)
            if stop <= begun:
                if file.read(len(made)) != made:
                    raise BadKnowledge(
                        f"{path}: was begun with keys that {model.name} does not give now; go on with the same model, "
                        "arithmetic, device, threads and version of torch, or take the folder away"
                    )
                continue
            file.write(made)
            file.flush()
            os.fsync(file.fileno())
            write_json(noted, {"windows": stop})
            progress(windows.begins(stop), count)
    noted.unlink()
    encoder = {"name": model.name, "dimension": model.key_dimension, "fingerprint": model.fingerprint()}
    return {"storage": kind, **windows.facts, "batch": options.batch, "encoder": encoder}


def _made(model: KeyModel, windows: Windows, first: int, stop: int, kind: Kind) -> NDArray[Any]:
    """The keys of these windows' entries, as they are stored."""
    rows = windows.rows(first, stop)
    keys = model.keys(rows)
    if keys.shape != (*rows.shape, model.key_dimension):
        raise BadKnowledge(f"{model.name} gave keys of shape {list(keys.shape)} for {list(rows.shape)} tokens")
    try:
        return narrow(windows.owned(keys, first), kind)
    except BadKnowledge as error:
        remedy = "keep keys as float32" if kind != "float32" else "check the model's weights"
        raise BadKnowledge(f"keys from entry {windows.begins(first):,} on: {error}; {remedy}") from None


def _write_head(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """That of a .npy file; its length in bytes."""
    head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)
    return file.tell()
