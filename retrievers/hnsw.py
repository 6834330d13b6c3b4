"""Approximate dense retrieval over a navigable graph: faiss's HNSW."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Document, Query, Ranking
from .encoder import QueryEncoder
from .errors import BadKnowledge, RetrieverFailed
from .faiss_file import read_faiss
from .kernel import OneKernel, Source
from .passages import Passages
from .ranking import rank


class HNSWDense(OneKernel):
    """What a walk through the graph finds, by the vectors' metric, scored again by the one kernel, with ties by id.

    The true answer is what this index returns. So that there is only one, faiss is always asked for the same number of
    documents, `ef_search` (it searches as wide as the larger of that and the number asked for, so asking for fewer or
    more would change which are found). They are scored and ranked as everywhere, and cut to k: the ranking for k is the
    beginning of the ranking for more, and no k brings more than `ef_search` documents. Each query walks alone, in one
    thread, so what it finds does not depend on the batch or on `threads`, which share the queries.

    `index_path` is a file that `build` wrote for these `vectors`. It holds the graph only: the vectors are those that
    are given, looked at where they lie, and shared with any other retriever over them. To hold them in memory,
    pass `Vectors.open(path, memory="copy")`; half precision is walked faster, and scored in float32 all the
    same. faiss reads many a damaged file without noticing, so check the file's checksum first. What is refused here,
    with `BadKnowledge` naming the file, is anything but such a graph, for the same metric, over as many vectors of
    this width.
    """

    def __init__(
        self,
        passages: Passages | Sequence[Document],
        vectors: Source,
        index_path: str | Path,
        encoder: QueryEncoder,
        *,
        ef_search: int = 256,
        threads: int = 1,
    ) -> None:
        if ef_search < 1:
            raise ValueError(f"a search holds at least 1 candidate, not {ef_search}")
        super().__init__(passages, vectors, encoder, threads=threads)
        self._graph = self._read(Path(index_path))
        self._storage = self._vectors.as_faiss()
        self._graph.storage, self._graph.own_fields = self._storage, False
        self._graph.hnsw.efSearch = ef_search
        self._depth = min(ef_search, len(self))

    @property
    def description(self) -> str:
        """What a report calls this retriever."""
        hnsw = self._graph.hnsw
        return (
            f"HNSW, {self._vectors.description}, faiss, "
            f"M {hnsw.nb_neighbors(1)}, efConstruction {hnsw.efConstruction}, efSearch {hnsw.efSearch}"
        )

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The k best of what the graph yields for each encoded query: at most `ef_search`, at least one. Blocking."""
        vectors = self._query_vectors(queries, k)
        shares = [share for share in np.array_split(vectors, self._threads) if len(share)]
        return [ranking for found in self._in_threads(lambda share: self._walk(share, k), shares) for ranking in found]

    def _walk(self, vectors: NDArray[np.float32], k: int) -> list[Ranking]:
        _, found = self._graph.search(vectors, self._depth)
        rankings = []
        for vector, ids in zip(vectors, found, strict=True):
            ids = ids[ids >= 0]  # a walk may end with fewer than it was asked for
            if not len(ids):
                raise RetrieverFailed("a walk through the HNSW graph found no document; build the index again")
            rankings.append(rank(ids, self._score_ids(vector[np.newaxis], ids[np.newaxis])[0], k))
        return rankings

    def _read(self, path: Path) -> Any:
        kinds = (self._faiss.IndexHNSWFlat,)
        graph = read_faiss(path, flags=0, kinds=kinds, maker="HNSWDense.build", vectors=self._vectors)
        if graph.storage is not None:
            raise BadKnowledge(f"{path}: is no index that HNSWDense.build writes: it holds vectors, too")
        return graph

    @staticmethod
    def build(
        vectors: Source,
        path: str | Path,
        *,
        m: int = 32,
        ef_construction: int = 200,
        threads: int = 1,
        seed: int = 0,
        chunk: int = 4096,
        checkpoint: int = 32_768,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Write the graph over `vectors`, for their metric, to `path`, in one rename at the end. Blocking.

        Each vector is linked to `m` others (2·`m` on the lowest level), found by a search `ef_construction` wide.
        `tell` gets the number of vectors in the graph and of all, at the start and after each `chunk`; it may raise to
        stop. Every `checkpoint` vectors, later whenever an eighth more are in, the graph so far is written to
        `path` + ".checkpoint", in one rename, and a build with the same arguments goes on from there.
        With one thread the file is the same byte for byte, however often the build was stopped; with more, threads
        race for the links, and every build makes another graph, as good.

        The build holds the vectors as they are stored, and the graph, about 8·`m` + 20 bytes a vector.
        A checkpoint that is damaged, or of a build with other arguments, vectors or version of faiss, raises
        `BadKnowledge` naming it; so does a file that cannot be written.
        """
        from .hnsw_build import HNSWBuild

        if m < 2 or min(ef_construction, threads, chunk, checkpoint) < 1:
            raise ValueError("HNSW needs m of at least 2, ef_construction, threads, chunk and checkpoint of at least 1")
        build = HNSWBuild(vectors, Path(path), m=m, ef_construction=ef_construction, seed=seed, chunk=chunk)
        build.run(threads=threads, checkpoint=checkpoint, tell=tell)
