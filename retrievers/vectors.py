"""How vectors are stored, opened and compared: float32, float16 or bfloat16; inner product or squared L2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .base import Ids
from .errors import BadKnowledge

Kind = Literal["float32", "float16", "bfloat16"]
Memory = Literal["map", "copy", "float32"]
Metric = Literal["inner product", "squared L2"]

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
"""numpy has no bfloat16, so its 16 bits stand in a field of that name. The dtype is written into the head of a .npy
file: the file itself says what it holds, whatever it is called. `array.view(np.uint16)` gives the bare bits."""

DTYPES: dict[Kind, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}

_BLOCK = 4096  # vectors converted and checked at once


class Vectors:
    """Vectors as they are stored, every element checked to be finite; made by `open`, never changed.

    float16 and bfloat16 become float32 without any rounding, so what is searched is exactly what is stored.

    `kind`       "float32", "float16" or "bfloat16"
    `stored`     C-contiguous [n, dimension] of float32, float16, or uint16 (the bits of bfloat16)
    `longest`    the largest length of a vector, right to a thousandth
    `name`       the file, for messages
    `metric`     by which every index over them compares: the largest inner product or the smallest squared L2 distance
    """

    def __init__(
        self, stored: NDArray[Any], kind: Kind, longest: float, name: str, metric: Metric = "inner product"
    ) -> None:
        self.stored = stored
        self.kind = kind
        self.longest = longest
        self.name = name
        self.metric = metric
        self.dimension: int = stored.shape[1]

    @classmethod
    def open(
        cls,
        source: "str | Path | NDArray[Any] | Vectors",
        *,
        count: int | None = None,
        dimension: int | None = None,
        memory: Memory = "map",
        metric: Metric = "inner product",
    ) -> "Vectors":
        """Vectors from a .npy file or an array whose dtype is one of `DTYPES`.

        `memory` says where they are searched:
        "map"        where they lie. A file stays on the disk, and the system keeps in memory what is used of it; an
                     array must not be changed. Memory of our own comes in larger pages: a scan of float32 takes 1.7
                     times as long from a map, one of half precision 1.2 times.
        "copy"       in memory, as they are stored
        "float32"    in memory, as float32
        Whichever it is, everything is read once, block by block, for the checks. `metric` is how they are compared.
        `Vectors` are already open, and served as they are, by the metric they have.

        Raises `BadKnowledge`, naming the file, for anything that is not `count` vectors of `dimension` finite numbers.
        """
        if isinstance(source, Vectors):
            _fit(source.name, source.stored.shape, count, dimension)
            return source
        if memory not in get_args(Memory):
            raise ValueError(f"vectors are opened with memory {' or '.join(get_args(Memory))}, not {memory!r}")
        if metric not in get_args(Metric):
            raise ValueError(f"vectors are compared by {' or '.join(get_args(Metric))}, not {metric!r}")
        name, stored = ("embeddings", source) if isinstance(source, np.ndarray) else _load(Path(source))
        kind = next((kind for kind, dtype in DTYPES.items() if dtype == stored.dtype), None)
        if kind is None:
            raise BadKnowledge(f"{name}: holds {stored.dtype}; store the vectors as float32, float16 or BFLOAT16")
        if stored.ndim != 2:
            raise BadKnowledge(f"{name}: has shape {list(stored.shape)}; expected one vector a passage, two axes")
        _fit(name, stored.shape, count, dimension)
        if 0 in stored.shape:
            raise BadKnowledge(f"{name}: holds no numbers, its shape is {list(stored.shape)}")
        if memory == "map" and not stored.flags.c_contiguous:
            raise BadKnowledge(f"{name}: its rows do not lie one after the other; write it again, or copy it to memory")
        stored = np.asarray(stored.view(np.uint16) if kind == "bfloat16" else stored)
        served: Kind = "float32" if memory == "float32" else kind
        held = (
            stored if memory == "map" else np.empty(stored.shape, np.float32 if served == "float32" else stored.dtype)
        )
        longest = 0.0
        for start in range(0, len(stored), _BLOCK):
            block = np.ascontiguousarray(stored[start : start + _BLOCK])
            rows = _widen(block, kind)
            longest = max(longest, _longest(rows, kind, name, start))
            if held is not stored:
                held[start : start + _BLOCK] = rows if served == "float32" else block
        return cls(held, served, longest, name, metric)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def description(self) -> str:
        """What a report calls them: how many, how wide, how stored, and their metric where it is not the usual one."""
        size = f"{len(self):,} x {self.dimension} {self.kind}"
        return size if self.metric == "inner product" else f"{size}, {self.metric}"

    @property
    def faiss_metric(self) -> int:
        """faiss's number for the metric."""
        import faiss

        number: int = faiss.METRIC_INNER_PRODUCT if self.metric == "inner product" else faiss.METRIC_L2
        return number

    def block(self, start: int, stop: int) -> NDArray[np.float32]:
        """Vectors start to stop as float32: a view where they are stored so, else a copy."""
        return _widen(self.stored[start:stop], self.kind)

    def blocks(self, rows: int = _BLOCK) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All vectors in order, so many at once, each block with the place of its first."""
        return ((start, self.block(start, start + rows)) for start in range(0, len(self), rows))

    def take(self, ids: Ids) -> NDArray[np.float32]:
        """Copies of chosen vectors as float32, [len(ids), dimension]."""
        return _widen(self.stored[ids], self.kind)

    def as_faiss(self, start: int = 0, stop: int | None = None) -> Any:
        """A faiss index by their metric over vectors start to stop, which looks at them where they lie.

        It can be searched and stored vectors compared; adding to it would end the process.
        """
        return over(self.empty_faiss(), self.stored[start:stop])

    def empty_faiss(self) -> Any:
        """A faiss index by their metric that stores vectors of this width and kind; none are in it."""
        import faiss

        if self.kind == "float32":
            flat = faiss.IndexFlatIP if self.metric == "inner product" else faiss.IndexFlatL2
            return flat(self.dimension)
        coding = faiss.ScalarQuantizer
        code = coding.QT_fp16 if self.kind == "float16" else coding.QT_bf16
        return faiss.IndexScalarQuantizer(self.dimension, code, self.faiss_metric)


def over(index: Any, rows: NDArray[Any]) -> Any:
    """An empty faiss index of codes, made to look at these rows, contiguous, as its codes, where they lie."""
    import faiss

    codes = rows.reshape(-1).view(np.uint8)
    memory: Any = faiss.MaybeOwnedVectorUInt8
    index.codes = memory.create_view(faiss.swig_ptr(codes), codes.size, memory().owner)
    index.ntotal = len(rows)
    index.referenced_objects = [codes]  # faiss's own place for what must live as long as the index
    return index


def narrow(rows: NDArray[Any], kind: Kind) -> NDArray[Any]:
    """Rows as an array of `DTYPES[kind]`, rounded to the nearest, ties to even.

    Raises `BadKnowledge` for a number that is not finite, or too large for the kind.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if kind == "bfloat16":
        bits = rows.view(np.uint32).astype(np.uint64)
        made = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        finite = (made & 0x7F80 != 0x7F80) & np.isfinite(rows)
        made = made.view(BFLOAT16)
    else:
        with np.errstate(over="ignore"):
            made = rows.astype(DTYPES[kind])
        finite = np.isfinite(made)
    if not finite.all():
        raise BadKnowledge(f"row {int(np.argmin(finite.all(axis=-1)))} has a number that {kind} cannot hold")
    return made


def _widen(rows: NDArray[Any], kind: Kind) -> NDArray[np.float32]:
    """Stored rows as float32; float32 rows themselves. Infinity and NaN in float16 come out as 65,536 or more."""
    if kind == "float32":
        return rows
    wide = np.empty(rows.shape, dtype=np.float32)
    if kind == "bfloat16":
        bits = wide.view(np.uint32)
        bits[:] = rows
        bits <<= 16
        return wide
    # float16 is float32 with the low 13 bits of the fraction absent and the exponent off by 112. Moving the bits and
    # multiplying by 2^112 is exact, below the normal range too, and five times faster than numpy's own conversion.
    bits = wide.view(np.int32)
    bits[:] = rows.view(np.int16)
    bits <<= 13
    bits &= np.int32(-0x70002000)  # takes away the copies of the sign that came with it
    wide *= np.float32(2.0**112)
    return wide


def _longest(rows: NDArray[np.float32], kind: Kind, name: str, start: int) -> float:
    """The largest length among rows widened from `kind`, the first of them vector `start`; refuses infinity and NaN."""
    limit = 2.0**16 if kind == "float16" else np.inf
    if not (rows.max() < limit and rows.min() > -limit):  # NaN passes neither
        finite = (np.abs(rows) < limit).all(axis=1)
        raise BadKnowledge(f"{name}: vector {start + int(np.argmin(finite))} is not finite; embed that passage again")
    square = float(np.einsum("ij,ij->i", rows, rows).max())
    if 1e-30 < square < 1e38:
        return float(square**0.5)
    return float(np.linalg.norm(rows.astype(np.float64), axis=1).max())  # a square left what float32 can hold


def _fit(name: str, shape: tuple[int, ...], count: int | None, dimension: int | None) -> None:
    if count is not None and shape[0] != count:
        raise BadKnowledge(f"{name}: {shape[0]} vectors for {count} passages; embed exactly these passages, in order")
    if dimension is not None and shape[1] != dimension:
        raise BadKnowledge(
            f"{name}: vectors are {shape[1]} wide, the query encoder's {dimension}; use the one that made them"
        )


def _load(path: Path) -> tuple[str, NDArray[Any]]:
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise BadKnowledge(f"{path}: there is no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise BadKnowledge(f"{path}: is no readable .npy file ({error}); write it again with numpy.save") from error
    if not isinstance(stored, np.ndarray):
        raise BadKnowledge(f"{path}: holds several arrays; store the vectors alone with numpy.save")
    return str(path), stored
