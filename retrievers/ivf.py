"""Approximate dense retrieval over lists of neighbouring vectors: faiss's inverted file (IVF)."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .base import Document, Query, Ranking, Vector
from .encoder import QueryEncoder
from .errors import BadKnowledge, MissingExtra
from .faiss_file import read_faiss
from .kernel import OneKernel, Source
from .passages import Passages
from .ranking import rank
from .vectors import Vectors

_BLOCK = 4096  # vectors put into lists at once


class IVFDense(OneKernel):
    """What faiss finds in the `probes` lists whose centroids are nearest to the query, scored again by the one kernel.

    What is near is said by the vectors' metric.

    The true answer is what this index returns, and there is only one: the lists are chosen by the one kernel (faiss
    alone would compare centroids by BLAS, whose sums change with the batch), faiss is always asked for the same number
    of documents, `depth`, each query is scanned in one thread, and equal scores stand in ascending id. So the ranking
    for k is the beginning of the ranking for more, and neither the batch nor `threads`, which share the queries,
    matter. No k brings more than `depth` documents; a search brings fewer where the lists hold fewer, but never none.

    `index_path` is a file that `build` wrote for these `vectors`, with a copy of them in the order of the lists; it is
    mapped, not read. faiss does not notice every damage, so check the file's checksum first. What is refused here,
    with `BadKnowledge` naming the file, is anything but such an index, for the same metric, over as many vectors of
    this width.
    """

    def __init__(
        self,
        passages: Passages | Sequence[Document],
        vectors: Source,
        index_path: str | Path,
        encoder: QueryEncoder,
        *,
        probes: int = 64,
        depth: int = 256,
        threads: int = 1,
    ) -> None:
        if probes < 1 or depth < 1:
            raise ValueError(f"a search is in at least 1 list for at least 1 document, not in {probes} for {depth}")
        super().__init__(passages, vectors, encoder, threads=threads)
        kinds, flags = (self._faiss.IndexIVFFlat, self._faiss.IndexIVFScalarQuantizer), self._faiss.IO_FLAG_MMAP
        path, maker = Path(index_path), "IVFDense.build"
        self._index = read_faiss(path, flags=flags, kinds=kinds, maker=maker, vectors=self._vectors)
        lists = self._index.invlists
        held = [one for one in range(self._index.nlist) if lists.list_size(one)]
        self._lists = np.array(held, dtype=np.int64)  # those that are not empty
        self._centroids = self._index.quantizer.reconstruct_n(0, self._index.nlist)[self._lists]
        self._depth = min(depth, len(self))
        self._index.nprobe = self._probes = min(probes, len(held))

    @property
    def description(self) -> str:
        """What a report calls this retriever."""
        return f"IVF, {self._vectors.description}, faiss, {self._index.nlist:,} lists, {self._probes} searched"

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The k best of each encoded query's lists: at most `depth`, at least one. Blocking."""
        return self._in_threads(lambda vector: self._scan_lists(vector, k), list(self._query_vectors(queries, k)))

    def _scan_lists(self, vector: Vector, k: int) -> Ranking:
        every = np.arange(len(self._centroids), dtype=np.int64)
        nearest = rank(every, self._score_all(vector, self._centroids), self._probes)
        lists, scores = self._lists[nearest.ids][np.newaxis], nearest.scores[np.newaxis]  # which faiss only passes on
        _, found = self._index.search_preassigned(vector[np.newaxis], self._depth, lists, scores)
        ids = found[0][found[0] >= 0]
        return rank(ids, self._score_ids(vector[np.newaxis], ids[np.newaxis])[0], k)

    @staticmethod
    def build(
        vectors: Source,
        path: str | Path,
        *,
        lists: int | None = None,
        sample: int = 32,
        iterations: int = 8,
        threads: int = 1,
        seed: int = 0,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Write an index of `vectors` to `path`, in one rename at the end. Blocking.

        `lists` centroids (None: about 4·sqrt(n)) are found by faiss's k-means, spherical for the inner product, in so
        many `iterations` over `sample` random vectors a list; then each vector is put into the list of its nearest, by
        the vectors' metric, which the index keeps. `tell` gets what is done
        and of how much, in vectors; it may raise to stop. In memory: the sample as float32, and the vectors as they
        are stored. With one thread the file is the same byte for byte for the same vectors, arguments and faiss.

        Raises `BadKnowledge` for vectors that cannot be used, and for a file that cannot be written.
        """
        try:
            import faiss
        except ImportError:
            raise MissingExtra("building an IVF index needs: pip install 'ralmspec[local]'") from None
        if min(sample, iterations, threads) < 1 or (lists is not None and lists < 1):
            raise ValueError("an IVF index needs lists, sample, iterations and threads of at least 1")
        opened, path = Vectors.open(vectors), Path(path)
        n = len(opened)
        k = min(n, lists or max(1, round(4 * n**0.5)))
        chosen = np.sort(np.random.default_rng(seed).choice(n, min(n, k * sample), replace=False, shuffle=False))
        faiss.omp_set_num_threads(threads)
        index = _empty(faiss, opened, k)
        index.cp.niter, index.cp.seed = iterations, seed
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, sample
        tell(0, n)
        index.train(opened.take(chosen))
        for start, block in opened.blocks(_BLOCK):
            index.add(block)
            tell(min(start + _BLOCK, n), n)
        _write(faiss, index, path)


def _empty(faiss: Any, vectors: Vectors, lists: int) -> Any:
    """Holds vectors as they are stored: half precision is decoded exactly."""
    d, metric = vectors.dimension, vectors.faiss_metric
    quantizer = faiss.IndexFlatIP(d) if vectors.metric == "inner product" else faiss.IndexFlatL2(d)
    if vectors.kind == "float32":
        return faiss.IndexIVFFlat(quantizer, d, lists, metric)
    coding = faiss.ScalarQuantizer
    form = coding.QT_fp16 if vectors.kind == "float16" else coding.QT_bf16
    return faiss.IndexIVFScalarQuantizer(quantizer, d, lists, form, metric, False)


def _write(faiss: Any, index: Any, path: Path) -> None:
    draft = path.with_name(path.name + ".new")
    try:
        faiss.write_index(index, str(draft))
        with draft.open("r+b") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, RuntimeError) as error:
        raise BadKnowledge(f"{path}: cannot be written ({error})") from error
