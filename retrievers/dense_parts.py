"""The parts of a folder that make vectors searchable by approximation: an HNSW graph and IVF lists."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .folder import Part, Progress
from .vectors import DTYPES, Kind, Vectors

Opened = Callable[[Path], Vectors]
"""The vectors in a folder, finished or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseOptions:
    """How vectors are made, kept and made searchable. `storage`: "float32", "float16" or "bfloat16"."""

    storage: Kind = "float32"
    device: str = "cpu"
    threads: int = 1
    hnsw_m: int = 32
    hnsw_ef_construction: int = 200
    ivf_lists: int = 0
    """0: about four times the square root of the number of vectors."""
    seed: int = 0

    def check(self, what: str, kinds: Collection[str], known: Collection[str]) -> None:
        """Raises `ValueError` for kinds, of retrievers for `what`, that are not known, and for unknown storage."""
        if unknown := [kind for kind in kinds if kind not in known]:
            raise ValueError(f"kinds: {', '.join(unknown)}; {what} can have {', '.join(known)}")
        if not kinds:
            raise ValueError(f"kinds: none given; {what} can have {', '.join(known)}")
        if self.storage not in DTYPES:
            raise ValueError(f"storage: {self.storage!r}; vectors are kept in {', '.join(DTYPES)}")


def dense_parts(options: DenseOptions, opened: Opened) -> list[Part]:
    """Both, over the vectors that `opened` finds, by their metric; a folder takes those that it was asked for."""
    return [Part("hnsw", partial(_hnsw, options, opened), resumes=True), Part("ivf", partial(_ivf, options, opened))]


def _hnsw(options: DenseOptions, opened: Opened, folder: Path, target: Path, progress: Progress) -> dict[str, Any]:
    from .hnsw import HNSWDense

    settings = {"m": options.hnsw_m, "ef_construction": options.hnsw_ef_construction, "seed": options.seed}
    path = target / "graph.faiss"
    HNSWDense.build(opened(folder), path, **settings, threads=options.threads, tell=progress)
    return settings


def _ivf(options: DenseOptions, opened: Opened, folder: Path, target: Path, progress: Progress) -> dict[str, Any]:
    from .ivf import IVFDense

    vectors = opened(folder)
    lists = options.ivf_lists or max(1, round(4 * len(vectors) ** 0.5))
    path = target / "lists.faiss"
    IVFDense.build(vectors, path, lists=lists, seed=options.seed, threads=options.threads, tell=progress)
    return {"lists": lists, "seed": options.seed}
