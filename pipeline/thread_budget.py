"""How many threads each native library gets, so that their pools do not spin against each other."""

import os
from dataclasses import dataclass
from typing import Self

from ralmspec.retrievers.errors import MissingExtra


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadBudget:
    """Threads for the model and the encoder (torch), one search (faiss), and the Java machine (Lucene).

    Two OpenMP pools whose threads together outnumber the cores wait for each other by spinning; on two cores that made
    decoding about ten times slower. So the default shares the cores out, and on two or three everything gets one.
    """

    model: int = 1
    index: int = 1
    jvm: int = 1

    def __post_init__(self) -> None:
        for name in ("model", "index", "jvm"):
            if getattr(self, name) < 1:
                raise ValueError(f"ThreadBudget({name}={getattr(self, name)}): at least 1 thread is needed")

    @classmethod
    def of(cls, cores: int) -> Self:
        """Half of the cores for the model, a quarter for the index, the rest for everything else."""
        return cls(model=max(1, cores // 2), index=max(1, cores // 4), jvm=max(1, cores // 4))

    def apply(self) -> None:
        """Tell torch, for the whole process; the index is told at each search, and Java when it starts.

        Raises `MissingExtra` without torch.
        """
        try:
            import torch
        except ImportError:
            raise MissingExtra("serving a local model needs: pip install 'ralmspec[local]'") from None
        torch.set_num_threads(self.model)


def cores() -> int:
    """Cores that this process may use; a container's quota of processor time is not seen here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
