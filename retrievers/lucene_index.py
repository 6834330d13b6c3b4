"""Lucene's own side of the index, by way of Java: its analyser, its writer, its searcher. All inside `jvm.entered`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .base import Ids, Scores
from .jvm import call, java_class

FIELD, ID = "contents", "id"  # the names that Anserini gives, so that its tools can read the index


class Analyzer:
    """Lucene's English analyser, as tokens and as a query. Thread-safe."""

    def __init__(self) -> None:
        self._analyzer = java_class("org.apache.lucene.analysis.en.EnglishAnalyzer")()
        self._analyze = java_class("io.anserini.analysis.AnalyzerUtils").analyze
        self._print = java_class("java.util.Objects").toString
        self._builder = java_class("org.apache.lucene.util.QueryBuilder")(self._analyzer)

    def tokens(self, text: str) -> list[str]:
        """The terms of the text in order. A Java list prints as [a, b]; no token holds a space."""
        printed = self._print(self._analyze(self._analyzer, text))[1:-1]
        return printed.split(", ") if printed else []

    def query(self, text: str) -> Any:
        """Any of the terms, each as often as it occurs. The text must have a term."""
        return call(self._builder, "createBooleanQuery", FIELD, text)


class IndexWriter:
    """Lucene's IndexWriter, so used that the one segment it leaves holds the documents in the order of adding."""

    def __init__(self, folder: Path, heap_mb: int) -> None:
        config = java_class("org.apache.lucene.index.IndexWriterConfig")(
            java_class("org.apache.lucene.analysis.en.EnglishAnalyzer")(),
            signature="(Lorg/apache/lucene/analysis/Analyzer;)V",
        )
        call(config, "setOpenMode", java_class("org.apache.lucene.index.IndexWriterConfig$OpenMode").CREATE)
        call(config, "setMergeScheduler", java_class("org.apache.lucene.index.SerialMergeScheduler")())
        neighbours_only = java_class("org.apache.lucene.index.LogByteSizeMergePolicy")()
        call(config, "setMergePolicy", neighbours_only)
        call(config, "setUseCompoundFile", False)
        call(config, "setRAMBufferSizeMB", float(max(8, heap_mb // 4)))
        kind = java_class("org.apache.lucene.document.FieldType")()
        call(kind, "setIndexOptions", java_class("org.apache.lucene.index.IndexOptions").DOCS_AND_FREQS)
        stored = java_class("org.apache.lucene.document.Field$Store").YES
        self._id = java_class("org.apache.lucene.document.StringField")(ID, "", stored)
        self._text = java_class("org.apache.lucene.document.Field")(
            *(FIELD, "", kind),
            signature="(Ljava/lang/String;Ljava/lang/CharSequence;Lorg/apache/lucene/index/IndexableFieldType;)V",
        )
        self._document = java_class("org.apache.lucene.document.Document")()
        call(self._document, "add", self._id)
        call(self._document, "add", self._text)
        self._folder = folder
        self._writer = java_class("org.apache.lucene.index.IndexWriter")(_directory(folder), config)

    def add(self, id: int, text: str) -> None:
        """The next document."""
        call(self._id, "setStringValue", str(id))
        call(self._text, "setStringValue", text)
        call(self._writer, "addDocument", self._document)

    def finish(self) -> None:
        """After the last document: one segment, on the disk."""
        call(self._writer, "forceMerge", 1)
        call(self._writer, "commit")

    def close(self) -> None:
        """Let go of the folder; documents after the last `finish` are gone."""
        call(self._writer, "rollback")
        (self._folder / "write.lock").unlink(missing_ok=True)


class Searcher:
    """Lucene's IndexSearcher over a folder, ranking by BM25 with these parameters. Thread-safe."""

    def __init__(self, folder: Path, k1: float, b: float) -> None:
        directory = _directory(folder)
        self._segments = java_class("org.apache.lucene.index.SegmentInfos").readLatestCommit(directory)
        self._reader = java_class("org.apache.lucene.index.DirectoryReader").open(directory)
        kind = java_class("org.apache.lucene.search.IndexSearcher")
        self._searcher = kind(self._reader, signature="(Lorg/apache/lucene/index/IndexReader;)V")
        similarity = java_class("org.apache.lucene.search.similarities.BM25Similarity")(k1, b)
        call(self._searcher, "setSimilarity", similarity)
        call(self._searcher, "setQueryCache", None)  # nothing to gain: no query has a filter
        kind.setMaxClauseCount(2**31 - 1)  # a query may be as long as it likes
        self._json = java_class("com.fasterxml.jackson.databind.ObjectMapper")()

    @property
    def documents(self) -> int:
        """Number of documents that were not deleted."""
        return int(call(self._reader, "numDocs"))

    @property
    def segments(self) -> int:
        """Number of parts that Lucene numbers one after the other."""
        return int(call(self._segments, "size"))

    def stored_id(self, number: int) -> str | None:
        """What the document that Lucene numbers so was given as its id."""
        document = call(call(self._searcher, "storedFields"), "document", number)
        return None if (id := call(document, "get", ID)) is None else str(id)

    def statistics(self) -> tuple[int, int, int]:
        """Documents with any term; pairs of a document and a term that it holds; tokens."""
        facts = call(self._searcher, "collectionStatistics", FIELD)
        if facts is None:
            return 0, 0, 0
        documents, postings, tokens = (call(facts, name) for name in ("docCount", "sumDocFreq", "sumTotalTermFreq"))
        return int(documents), int(postings), int(tokens)

    def search(self, query: Any, k: int) -> tuple[Ids, Scores]:
        """Lucene's numbers of the k best documents that match, best first, and their scores."""
        found = call(self._searcher, "search", query, k)
        # One crossing to Python instead of three a document.
        hits = json.loads(call(self._json, "writeValueAsString", found))["scoreDocs"]
        numbers = np.array([hit["doc"] for hit in hits], dtype=np.int64)
        return numbers, np.array([hit["score"] for hit in hits], dtype=np.float32)


def _directory(folder: Path) -> Any:
    path = java_class("java.nio.file.Path").of(str(folder))
    return java_class("org.apache.lucene.store.FSDirectory").open(path)
