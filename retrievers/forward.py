"""Which terms every document holds: scores a few chosen documents as Lucene scores them, without Lucene."""

from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from . import ragged
from .base import Ids, Scores
from .errors import BadKnowledge

Terms = NDArray[np.uint32]
Weights = NDArray[np.float32]

_NAMES = {"starts": "<i8", "terms": "<u4", "counts": "<u2", "lengths": "u1", "frequencies": "<i8"}
_MOST = (1 << 16) - 1  # occurrences of a term in a document
_SIEVE = 1 << 16


def _decoded_lengths() -> NDArray[np.float32]:
    """What the 256 codes stand for that Lucene keeps a document's length in: exact up to 40, then 4 significant bits.

    A code from 24 on, less 24, is a float of 3 bits of mantissa and 5 of exponent, to which 24 is added.
    """
    lengths = list(range(24))
    for code in range(256 - 24):
        mantissa, exponent = code & 7, (code >> 3) - 1
        lengths.append(24 + (mantissa if exponent < 0 else (mantissa | 8) << exponent))
    return np.array(lengths, dtype=np.float32)


LENGTHS = _decoded_lengths()


class ForwardIndex:
    """The other way round from Lucene's postings: by document, its terms and how often each occurs. Mapped, read-only.

    `score` is Lucene's BM25, operation by operation in float32. For a term of weight w (its boost times its idf) that
    occurs f times in a document, Lucene takes w - w / (1 + f·s), where s = 1 / (k1·(1 - b + b·length/average)) comes
    from a table over the 256 codes of a length; it adds the terms' shares in double precision, and rounds the sum to
    float32. The order of that addition varies (Lucene skips and reorders), but where `is_exact` says so it cannot
    matter, since no addition rounds at all:

    Let w lie in [2^e, 2^(e+1)). If w / (1 + f·s), rounded, is at least w/2, it is a multiple of 2^(e-24) and so is its
    difference from w, which float32 holds exactly; else that difference is more than 2^(e-1), where float32 numbers
    are multiples of 2^(e-24) too. So with e taken for the least weight every share is a multiple of 2^(e-24), and so
    is every partial sum; none exceeds the sum of the weights; and a double holds every multiple of 2^(e-24) up to
    2^(e+29) exactly. The sum of the weights being at most 2^28 times the least weight, which is below 2^(e+1), is
    enough. A query would need a term found in all but a millionth of millions of documents to break it.

    Files that are missing or do not fit each other raise `BadKnowledge` naming the file. Thread-safe.
    """

    def __init__(self, folder: Path) -> None:
        self._starts, self._terms, self._counts, self._lengths, self.frequencies = (
            _load(_path(folder, name), dtype) for name, dtype in _NAMES.items()
        )
        path = folder / "vocabulary.txt"
        try:
            terms = path.read_text(encoding="utf-8").split("\n")[:-1]
        except (OSError, ValueError) as error:
            raise BadKnowledge(f"{path}: cannot be read ({error}); build the index again") from None
        self._vocabulary = {term: id for id, term in enumerate(terms)}
        if len(self._starts) == 0 or self._starts[-1] != len(self._terms):
            raise BadKnowledge(f"{_path(folder, 'starts')}: does not fit the terms beside it; build the index again")
        for name, held, needed in (
            ("counts", len(self._counts), len(self._terms)),
            ("lengths", len(self._lengths), len(self)),
            ("frequencies", len(self.frequencies), len(self._vocabulary)),
        ):
            if held != needed:
                raise BadKnowledge(f"{_path(folder, name)}: {held} entries, not {needed}; build the index again")
        self._saturation = np.ones(256, dtype=np.float32)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def postings(self) -> int:
        """Pairs of a document and a term that it holds."""
        return len(self._terms)

    def weigh_lengths(self, average: float, k1: float, b: float) -> None:
        """Fix the s of the class's docstring for every code of a length; `average` is the mean length in terms."""
        one, k1_, b_ = np.float32(1), np.float32(k1), np.float32(b)
        self._saturation = one / (k1_ * ((one - b_) + b_ * LENGTHS / np.float32(average)))

    def look_up(self, tokens: Sequence[str]) -> dict[int, int]:
        """How often each known term stands among the tokens, by the term's id, ascending."""
        known = Counter(id for token in tokens if (id := self._vocabulary.get(token)) is not None)
        return dict(sorted(known.items()))

    def fetch(self, ids: Ids) -> None:
        """Have what `score` will need of these documents read from the disk, if it is not in memory."""
        _, places = ragged.places(self._starts, ids)
        self._terms.take(places)
        self._counts.take(places)

    def score(self, terms: Terms, weights: Weights, ids: Ids) -> Scores:
        """Float32 [n] scores of documents; `terms` ascending without repetition, with a weight each."""
        if len(terms) == 0:
            return np.zeros(len(ids), dtype=np.float32)
        ends, places = ragged.places(self._starts, ids)
        held = self._terms.take(places)
        # Nearly all that a document holds is not asked for; the low 16 bits tell most of it apart, cheaply.
        sieve = np.zeros(_SIEVE, dtype=np.bool_)
        sieve[terms % _SIEVE] = True
        left = np.flatnonzero(sieve.take(held.astype(np.uint16)))
        held = held[left]
        slots = terms.searchsorted(held)
        slots[slots == len(terms)] = 0
        found = terms[slots] == held
        left, slots = left[found], slots[found]
        rows = ends.searchsorted(left, side="right")
        weight = weights[slots]
        saturated = self._counts[places[left]].astype(np.float32) * self._saturation[self._lengths[ids[rows]]]
        shares = weight - weight / (np.float32(1) + saturated)
        return np.bincount(rows, weights=shares, minlength=len(ids)).astype(np.float32)


def is_exact(weights: Weights) -> bool:
    """Whether no order of addition can change a score, by the argument in `ForwardIndex`."""
    return len(weights) == 0 or float(weights.sum(dtype=np.float64)) < 2.0**28 * float(weights.min())


class ForwardWriter:
    """Writes the files of a `ForwardIndex` document by document; only the vocabulary is held in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._vocabulary: dict[str, int] = {}
        self._frequencies = array("q")
        self._columns = {name: _Column(_path(folder, name), dtype) for name, dtype in _NAMES.items()}
        self._columns["starts"].append([0])
        self._postings = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for column in self._columns.values():
            column.close()

    def add(self, tokens: Sequence[str]) -> None:
        """The next document; raises `BadKnowledge` if a term occurs in it more than 65,535 times."""
        held = Counter(tokens)
        if held and max(held.values()) > _MOST:
            raise BadKnowledge(f"a passage has the same word more than {_MOST:,} times; split it into several")
        terms = []
        for token in held:
            term = self._vocabulary.setdefault(token, len(self._vocabulary))
            if term == len(self._frequencies):
                self._frequencies.append(0)
            self._frequencies[term] += 1
            terms.append(term)
        self._postings += len(terms)
        self._columns["terms"].append(terms)
        self._columns["counts"].append(list(held.values()))
        self._columns["lengths"].append([int(LENGTHS.searchsorted(len(tokens), side="right")) - 1])
        self._columns["starts"].append([self._postings])

    def finish(self) -> None:
        """After the last document."""
        self._columns["frequencies"].append(self._frequencies)
        text = "".join(f"{term}\n" for term in self._vocabulary)
        (self._folder / "vocabulary.txt").write_text(text, encoding="utf-8", newline="\n")


class _Column:
    """A one-dimensional .npy file that grows; its header, which numpy leaves room in, is set when it is closed."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._count = 0
        self._head()

    def append(self, values: "Sequence[int] | array[int]") -> None:
        self._count += len(values)
        self._file.write(np.array(values, dtype=self._dtype).tobytes())

    def close(self) -> None:
        self._file.seek(0)
        self._head()
        self._file.close()

    def _head(self) -> None:
        described = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._file, described)


def _path(folder: Path, name: str) -> Path:
    return folder / f"forward_{name}.npy"


def _load(path: Path, dtype: str) -> NDArray[Any]:
    try:
        column = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadKnowledge(f"{path}: is no readable .npy file ({error}); build the index again") from None
    if not isinstance(column, np.ndarray) or column.dtype != np.dtype(dtype) or column.ndim != 1:
        raise BadKnowledge(f"{path}: is not a column of {np.dtype(dtype)}; build the index again")
    return column.view(np.ndarray)  # still mapped, but indexed at an array's speed
