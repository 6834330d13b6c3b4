"""Sparse retrieval by BM25 in memory, without a server or Java: bm25s scores, this file keeps the promises."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import ragged
from .analyzer import NAME, Analyzer, TermNumbers
from .base import Document, Ids, Query, Ranking, Scores
from .errors import BadKnowledge, MissingExtra, RetrieverFailed
from .passages import Passages
from .ranking import rank

# bm25s writes the first five files, under its own names: weights by term, for searching.
_PARAMETERS, _TERMS = "params.index.json", "vocab.index.json"
_WEIGHTS, _DOCUMENTS, _STARTS = "data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy"
# The same weights by document, for scoring a few.
_FORWARD_WEIGHTS, _FORWARD_TERMS, _FORWARD_STARTS = "forward_weights.npy", "forward_terms.npy", "forward_starts.npy"
_ANALYZER = "analyzer.json"

_GROUPED = 64  # documents that share one maximum while the best are looked for
_CHUNK = 1 << 22  # numbers checked at once
_REMEMBERED_QUERIES = 1024


class BM25:
    """The k passages with the highest BM25 score, exact in float32, ties by id.

    A passage is indexed as its title, a line break and its text. `Analyzer` makes terms of passages and queries; a
    word that a query repeats counts as often as it stands there. Passages without a term of the query score 0 and
    follow the others, by id; so a query that has no terms, or only unknown ones, ranks all passages by id.

    **One order of additions gives every score.** bm25s has worked out the weight of each term in each passage when
    the index was built; a score is the sum of the query's terms' weights. In float32 a sum depends on its order, so
    search and `score` both add by ascending term number, a repeated term once for each time, to zero: the same numbers
    in the same order, bit for bit, whatever stands beside the query in a batch. Hence also the same score for the same
    words in another order.

    **Ties at the cut.** bm25s's own choice among equal scores is arbitrary, so only its scores are used: the best are
    found by a floor that at least k passages reach, and `rank` orders all that reach it.

    `folder` holds what `build` wrote; its arrays are mapped into memory. What does not fit `passages` or is no such
    index raises `BadKnowledge` naming the file, an absent package `MissingExtra`. All methods are thread-safe.
    """

    concurrency = 1

    def __init__(self, passages: Passages | Sequence[Document], folder: str | Path) -> None:
        bm25s = _bm25s()
        folder = Path(folder)
        self._passages = passages
        self._analyze = Analyzer()
        self._k1, self._b = _parameters(folder, len(passages))
        self._numbers = _numbers_of_terms(folder / _TERMS)
        terms, count = len(self._numbers), len(passages)
        starts, documents, weights = _lists(folder, (_STARTS, _DOCUMENTS, _WEIGHTS), terms, count)
        forward = _lists(folder, (_FORWARD_STARTS, _FORWARD_TERMS, _FORWARD_WEIGHTS), count, terms)
        self._forward_starts, self._forward_terms, self._forward_weights = forward
        if len(self._forward_terms) != len(documents):
            raise _unfit(folder / _FORWARD_TERMS, f"does not belong to {_DOCUMENTS}")
        self._index: Any = bm25s.BM25(k1=self._k1, b=self._b, method="lucene", backend="numpy")
        self._index.scores = {"data": weights, "indices": documents, "indptr": starts, "num_docs": count}
        self._index.nonoccurrence_array = None
        # Encoding analyses a text, in a worker thread; the searches and scores that follow find it done.
        self._analyzed = lru_cache(_REMEMBERED_QUERIES)(self._terms)

    @staticmethod
    def build(
        passages: Iterable[Document],
        folder: str | Path,
        *,
        k1: float = 0.9,
        b: float = 0.4,
        tell: Callable[[int, int], None],
        total: int,
    ) -> None:
        """Writes the index of `passages`, read once and in order, into `folder`; the same bytes for the same passages.

        Texts are not kept; the numbers of their terms are, 4 bytes each. `tell` is called now and then with how many
        of `total` passages' worth of work is done. Raises `BadKnowledge` for passages that cannot be indexed or a
        folder that cannot be written, `MissingExtra` if a package is absent, `ValueError` for a negative or infinite
        k1 or a b outside 0 to 1.
        """
        if not (0 <= k1 < math.inf and 0 <= b <= 1):
            raise ValueError(f"BM25 needs k1 of at least 0 and b from 0 to 1, not {k1} and {b}")
        bm25s = _bm25s()
        tokens = TermNumbers(passages, tell, total, iterations=3)  # that bm25s makes
        if not tokens.vocab:
            raise BadKnowledge(f"none of the {len(tokens)} passages holds a word that can be indexed")
        index = bm25s.BM25(k1=float(k1), b=float(b), method="lucene", backend="numpy", csc_backend="numpy")
        index.index(tokens, create_empty_token=False, show_progress=False)
        starts, documents, weights = index.scores["indptr"], index.scores["indices"], index.scores["data"]
        terms = np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))
        by_document = np.argsort(documents, kind="stable")  # terms stay in ascending order within a document
        ends = np.cumsum(np.bincount(documents, minlength=len(tokens)), dtype=np.int64)
        folder = Path(folder)
        try:
            index.save(folder, show_progress=False)
            np.save(folder / _FORWARD_STARTS, np.concatenate([np.zeros(1, dtype=np.int64), ends]), allow_pickle=False)
            np.save(folder / _FORWARD_TERMS, terms[by_document], allow_pickle=False)
            np.save(folder / _FORWARD_WEIGHTS, weights[by_document], allow_pickle=False)
            (folder / _ANALYZER).write_text(json.dumps({"analyzer": NAME}) + "\n", encoding="utf-8")
        except OSError as error:
            raise BadKnowledge(f"{folder}: the index cannot be written ({error})") from error
        tell(total, total)

    @property
    def description(self) -> str:
        """What a report calls this retriever."""
        return f"BM25, {len(self):,} passages, {len(self._numbers):,} terms, k1 {self._k1:g}, b {self._b:g}, bm25s"

    def __len__(self) -> int:
        return len(self._passages)

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        """The same queries: a sparse query is its text, whose terms are now remembered."""
        for query in queries:
            self._analyzed(query.text)
        return list(queries)

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The k best passages of each query (all, if there are fewer). Blocking."""
        if k < 1:
            raise ValueError(f"a search is for at least 1 document, not {k}")
        k = min(k, len(self))
        return [_best(self._index.get_scores_from_ids(self._analyzed(query.text).added), k) for query in queries]

    def rows(self, ids: Ids) -> Ids:
        """The ids themselves, copied, int64 [n]; what `score` reads of these passages is now in memory."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise BadKnowledge(f"asked for the terms of documents {ids.min()} to {ids.max()}; there are {len(self)}")
        rows = np.array(ids, dtype=np.int64)
        _, places = ragged.places(self._forward_starts, rows)
        self._forward_terms.take(places)
        self._forward_weights.take(places)
        return rows

    def score(self, query: Query, rows: NDArray[Any]) -> Scores:
        """Scores of the passages in `rows`, float32 [n], bitwise those of `search`.

        The cost follows the number of different words in these passages, not the size of the index.
        """
        if rows.ndim != 1 or rows.dtype != np.int64:
            raise RetrieverFailed(f"rows must be int64 [n], as rows() gives them, not {rows.dtype} {list(rows.shape)}")
        terms = self._analyzed(query.text)
        asked = np.zeros(len(self._numbers), dtype=np.bool_)
        asked[terms.different] = True
        ends, places = ragged.places(self._forward_starts, rows)
        held = self._forward_terms.take(places)
        hits = np.flatnonzero(asked.take(held))
        if len(terms.different) < len(terms.added):
            hits = hits.repeat(terms.times[terms.different.searchsorted(held[hits])])
        scores = np.zeros(len(rows), dtype=np.float32)
        np.add.at(scores, ends.searchsorted(hits, side="right"), self._forward_weights[places[hits]])
        return scores

    def document(self, id: int) -> Document:
        """The passage itself. Thread-safe."""
        return self._passages[id]

    def _terms(self, text: str) -> "_Terms":
        known = [self._numbers[term] for term in self._analyze(text) if term in self._numbers]
        different, times = np.unique(np.array(known, dtype=np.int64), return_counts=True)
        return _Terms(different, times, np.repeat(different, times))


@dataclass(frozen=True, slots=True, eq=False)
class _Terms:
    """A query's terms: each once and ascending, how often each stands there, and all in the order of adding."""

    different: NDArray[np.int64]
    times: NDArray[np.int64]
    added: NDArray[np.int64]


def _best(scores: Scores, k: int) -> Ranking:
    """The k best of all documents, whose ids are their places; k is at most their number, no score below 0.

    The documents are dealt into groups. The k-th highest of the groups' maxima is reached in k groups, so by k
    documents, and whatever is among the k best reaches it too: only those are ordered, usually little more than k.
    A partition of all scores, most of which are 0 or nearly equal, costs fifty times as much.
    """
    groups = len(scores) // _GROUPED
    if k <= groups:
        maxima = scores[: groups * _GROUPED].reshape(_GROUPED, groups).max(axis=0)
        floor = np.partition(maxima, groups - k)[groups - k]
        if floor > 0:
            ids = np.flatnonzero(scores >= floor)
            return rank(ids, scores[ids], k)
    ids = np.flatnonzero(scores)
    if len(ids) < k:
        ids = np.concatenate([ids, np.flatnonzero(scores == 0)[: k - len(ids)]])
    return rank(ids, scores[ids], k)


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise MissingExtra("BM25 needs: pip install 'ralmspec[local]'") from None
    return bm25s


def _unfit(path: Path, what: str) -> BadKnowledge:
    return BadKnowledge(f"{path}: {what}; build the index again from these passages")


def _parameters(folder: Path, count: int) -> tuple[float, float]:
    """k1 and b, once everything else is as this file expects it."""
    stored = {_ANALYZER: _json(folder / _ANALYZER), _PARAMETERS: _json(folder / _PARAMETERS)}
    for name, key, wanted in (
        (_ANALYZER, "analyzer", NAME),
        (_PARAMETERS, "num_docs", count),
        (_PARAMETERS, "method", "lucene"),
        (_PARAMETERS, "idf_method", "lucene"),
    ):
        if stored[name].get(key) != wanted:
            raise _unfit(folder / name, f"{key} is {stored[name].get(key)!r}, not {wanted!r}")
    k1, b = (stored[_PARAMETERS].get(key) for key in ("k1", "b"))
    if not isinstance(k1, int | float) or not isinstance(b, int | float):
        raise _unfit(folder / _PARAMETERS, f"k1 and b must be numbers, found {k1!r} and {b!r}")
    return k1, b


def _numbers_of_terms(path: Path) -> dict[str, int]:
    terms = _json(path)
    if list(terms.values()) != list(range(len(terms))):
        raise _unfit(path, "terms must be numbered from 0, in order")
    return {term: number for number, term in enumerate(terms)}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unfit(path, f"cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise _unfit(path, f"holds a {type(value).__name__}, not a JSON object")
    return value


def _lists(folder: Path, names: tuple[str, str, str], lists: int, below: int) -> list[NDArray[Any]]:
    """Starts int64 [lists + 1], numbers int32 [n] ascending in each list and under `below`, weights float32 [n]."""
    paths = [folder / name for name in names]
    starts, numbers, weights = arrays = [
        _array(path, np.dtype(kind)) for path, kind in zip(paths, ("int64", "int32", "float32"), strict=True)
    ]
    if len(starts) != lists + 1 or starts[0] != 0 or starts[-1] != len(numbers) or (np.diff(starts) < 0).any():
        raise _unfit(paths[0], f"does not divide {names[1]} into {lists} lists")
    if len(weights) != len(numbers):
        raise _unfit(paths[2], f"holds {len(weights)} weights for {len(numbers)} numbers in {names[1]}")
    for begin in range(0, len(numbers), _CHUNK):
        part, weight = numbers[begin : begin + _CHUNK + 1], weights[begin : begin + _CHUNK]
        falls = np.flatnonzero(part[1:] <= part[:-1]) + (begin + 1)
        if part.min() < 0 or part.max() >= below or (starts[starts.searchsorted(falls)] != falls).any():
            raise _unfit(paths[1], f"numbers must lie under {below} and ascend in each list")
        if not ((weight >= 0) & (weight < np.inf)).all():
            raise _unfit(paths[2], "a weight is negative or not finite")
    return arrays


def _array(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """One axis of this type, mapped into memory; slices of a plain view cost less than those of numpy's memmap."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # what numpy raises on strange bytes is not one family
        raise _unfit(path, f"cannot be read as .npy ({error})") from error
    if not isinstance(stored, np.ndarray) or stored.dtype != dtype or stored.ndim != 1:
        raise _unfit(path, f"must hold one axis of {dtype}")
    return np.asarray(stored)
