"""Sparse retrieval by Lucene: BM25 over Porter-stemmed English, searched in this process's JVM."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import jvm
from .base import Document, Ids, Query, Ranking, Scores
from .errors import BadKnowledge, RetrieverFailed
from .forward import ForwardIndex, ForwardWriter, Terms, Weights, is_exact
from .lucene_index import Analyzer, IndexWriter, Searcher
from .passages import Passages
from .ranking import rank

_CHUNK = 1 << 14  # documents scored at once when every one is


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TermQuery(Query):
    """A query as the index sees it: ids of the terms it has, ascending, and each one's weight (count times idf)."""

    terms: Terms
    weights: Weights


class Lucene:
    """The k best documents by Lucene's BM25, exactly; ties by id; scores that `score` repeats bit for bit.

    Lucene searches with its own IndexSearcher, BM25Similarity and EnglishAnalyzer (Anserini's choice: Porter stemming,
    its default stop words). The index is one segment in the order of the passages, so Lucene's order of equal scores,
    by document number, is by id, and what it returns for k is the beginning of what it returns for more: the skipping
    that a small k allows drops only documents that cannot enter.

    **Scores.** `score` needs no Java: it computes from a `ForwardIndex` beside Lucene's files, which says why both sum
    to the same bits in whatever order Lucene adds. Every search scores its results again that way and compares: a
    difference raises `RetrieverFailed`, for the two then are not of one build. A query for which the argument does not
    hold (see `is_exact`) is answered by scoring every document, and Lucene is not asked.

    **No match, score 0.** Where fewer than k documents share a term with the query the rest follow by id with score 0,
    so a query without any known term ranks documents 0, 1, 2, ...

    `encode` analyses the text once and returns `TermQuery`. `rows` of documents are their ids; what `score` reads of
    them is mapped, and `rows` sees to it that it is in memory. `folder` is what `build` wrote, and checked against
    `passages` here: `BadKnowledge` names what does not fit. `heap_mb` and `jvm_threads` go to `jvm.start`; `threads`
    is the number of searches that may run at once, each in the thread that calls.
    """

    def __init__(
        self,
        passages: Passages | Sequence[Document],
        folder: str | Path,
        *,
        k1: float = 0.9,
        b: float = 0.4,
        threads: int = 1,
        heap_mb: int = 512,
        jvm_threads: int = 1,
    ) -> None:
        if threads < 1:
            raise ValueError(f"at least 1 search must be allowed at a time, not {threads}")
        if not (k1 > 0 and 0 <= b <= 1):
            raise ValueError(f"BM25 takes k1 above 0 and b from 0 to 1, not {k1} and {b}")
        jvm.start(heap_mb=heap_mb, threads=jvm_threads)
        self._folder = Path(folder)
        if not self._folder.is_dir():  # Lucene would make it
            raise BadKnowledge(f"{folder}: there is no such folder; build the index again")
        self._passages = passages
        self._k1, self._b, self._threads = k1, b, threads
        self._forward = ForwardIndex(self._folder)
        with jvm.entered(BadKnowledge, f"{folder}: cannot be opened as a Lucene index"):
            self._analyzer = Analyzer()
            self._searcher = Searcher(self._folder, k1, b)
            self._log = jvm.java_class("java.lang.Math").log
            version = jvm.java_class("org.apache.lucene.util.Version").LATEST
            self._version = str(jvm.call(version, "toString"))
            self._documents = self._check()
        self._idfs: dict[int, np.float32] = {}
        self.search(self.encode([Query(text=passages[0].text)]), 1)  # what does not agree shows now; and it warms up

    @staticmethod
    def build(
        passages: Iterable[Document],
        folder: str | Path,
        *,
        heap_mb: int = 512,
        total: int = 0,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> int:
        """Write an index of the passages, numbered from 0, into `folder`; returns their number. Streams them.

        Of memory it takes the JVM's and the vocabulary. `tell(done, total)` is called now and then. The same passages
        give the same search results; Lucene's files also hold random ids and the time. Raises `BadKnowledge` for
        passages out of order, for one word more than 65,535 times in a passage and for a folder that cannot be
        written, `MissingExtra`, and `RetrieverFailed` for what Java throws.
        """
        jvm.start(heap_mb=heap_mb)
        folder, count = Path(folder), 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with ForwardWriter(folder) as forward, jvm.entered(RetrieverFailed, f"{folder}: Lucene cannot write it"):
                analyzer, writer = Analyzer(), IndexWriter(folder, heap_mb)
                try:
                    for document in passages:
                        if document.id != count:
                            raise BadKnowledge(f"passage {document.id} stands in row {count}: number them by row")
                        text = _clean(f"{document.title}\n{document.text}")
                        forward.add(analyzer.tokens(text))
                        writer.add(document.id, text)
                        count += 1
                        if count % 1000 == 0:
                            tell(count, total)
                    if count == 0:
                        raise BadKnowledge("there are no passages to index")
                    forward.finish()
                    writer.finish()
                finally:
                    writer.close()
        except OSError as error:
            raise BadKnowledge(f"{folder}: the index cannot be written ({error})") from error
        tell(count, count)
        return count

    @property
    def description(self) -> str:
        """What a report calls this retriever."""
        return f"BM25 by Lucene {self._version}, {len(self):,} passages, English, k1 {self._k1:g}, b {self._b:g}"

    @property
    def concurrency(self) -> int:
        """How many searches may run at the same time."""
        return self._threads

    def __len__(self) -> int:
        return len(self._passages)

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        """The queries as `TermQuery`; those that are ones already stay as they are. Blocking."""
        with jvm.entered(RetrieverFailed, "analysing a query"):
            return [query if isinstance(query, TermQuery) else self._encode(query) for query in queries]

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The k best documents of each encoded query (all, if there are fewer). Blocking."""
        if k < 1:
            raise ValueError(f"a search is for at least 1 document, not {k}")
        with jvm.entered(RetrieverFailed, "searching"):
            return [self._search(_encoded(query), min(k, len(self))) for query in queries]

    def rows(self, ids: Ids) -> NDArray[np.int64]:
        """The ids themselves, int64 [n], with what scoring them needs brought into memory."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise BadKnowledge(f"asked for documents {ids.min()} to {ids.max()}; there are {len(self)}")
        self._forward.fetch(ids)
        return ids.astype(np.int64)

    def score(self, query: Query, rows: NDArray[Any]) -> Scores:
        """BM25 of an encoded query with the documents behind `rows`, float32 [n], bitwise those of `search`."""
        encoded = _encoded(query)
        if rows.ndim != 1 or rows.dtype != np.int64:
            raise RetrieverFailed(f"rows must be int64 [n], not {rows.dtype} {list(rows.shape)}")
        return self._forward.score(encoded.terms, encoded.weights, rows)

    def document(self, id: int) -> Document:
        """The passage itself. Thread-safe."""
        return self._passages[id]

    def _encode(self, query: Query) -> TermQuery:
        counts = self._forward.look_up(self._analyzer.tokens(_clean(query.text)))
        weights = [np.float32(count) * self._idf(term) for term, count in counts.items()]
        return TermQuery(
            text=query.text,
            vector=query.vector,
            terms=np.array(list(counts), dtype=np.uint32),
            weights=np.array(weights, dtype=np.float32),
        )

    def _idf(self, term: int) -> np.float32:
        frequency = int(self._forward.frequencies[term])
        idf = self._idfs.get(frequency)
        if idf is None:  # Java's logarithm: another could differ in the last bit
            odds = (self._documents - frequency + 0.5) / (frequency + 0.5)
            idf = self._idfs[frequency] = np.float32(self._log(1 + odds))
        return idf

    def _search(self, query: TermQuery, k: int) -> Ranking:
        if not is_exact(query.weights):
            return self._scan(query, k)
        ids, theirs = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        if len(query.terms):
            ids, theirs = self._searcher.search(self._analyzer.query(_clean(query.text)), k)
        scores = self._forward.score(query.terms, query.weights, ids)
        if not np.array_equal(scores, theirs):
            worst = int(np.argmax(scores != theirs))
            raise RetrieverFailed(
                f"{self._folder}: document {ids[worst]} scores {theirs[worst]} by Lucene and {scores[worst]} by the "
                f"arrays beside it for the query {query.text[:80]!r}: they are not of one build; build the index again"
            )
        ids, scores = ids[scores > 0], scores[scores > 0]
        if len(ids) < k:
            rest = np.setdiff1d(np.arange(k), ids)[: k - len(ids)]
            ids, scores = np.append(ids, rest), np.append(scores, np.zeros(len(rest), dtype=np.float32))
        return Ranking(ids, scores)

    def _scan(self, query: TermQuery, k: int) -> Ranking:
        """The same ranking by definition: every document scored."""
        every = np.arange(len(self), dtype=np.int64)
        chunks = [every[start : start + _CHUNK] for start in range(0, len(every), _CHUNK)]
        scores = [self._forward.score(query.terms, query.weights, chunk) for chunk in chunks]
        return rank(every, np.concatenate(scores), k)

    def _check(self) -> int:
        """That the index is of these passages, in their order, and of the arrays beside it; number with any term."""
        held, segments, count = self._searcher.documents, self._searcher.segments, len(self)
        if not held == len(self._forward) == count or segments != 1:
            raise BadKnowledge(
                f"{self._folder}: {held} documents in {segments} segments, {len(self._forward)} in the arrays beside "
                f"them, for {count} passages; build the index again of exactly these"
            )
        for row in sorted({round(step * (count - 1) / 15) for step in range(16)}):
            if (id := self._searcher.stored_id(row)) != str(row):
                raise BadKnowledge(f"{self._folder}: document {row} has the id {id}; build the index again")
        documents, postings, tokens = self._searcher.statistics()
        if postings != self._forward.postings:
            raise BadKnowledge(f"{self._folder}: Lucene's files and the arrays beside them are not of one build")
        if documents:
            self._forward.weigh_lengths(tokens / documents, self._k1, self._b)
        return documents


def _encoded(query: Query) -> TermQuery:
    if not isinstance(query, TermQuery):
        raise RetrieverFailed(f"the query {query.text!r} has no terms: pass it through encode() first")
    return query


def _clean(text: str) -> str:
    """Half a surrogate pair is no character, and Java gets none."""
    return text.encode("utf-8", "replace").decode("utf-8")
