"""What one search costs, by the number of queries in it: the b(batch) of every retriever."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ralmspec.retrievers.base import Query, Retriever

WORDS = 24  # about 32 tokens, as long as the queries of in-context RaLM are


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCost:
    """Seconds that one search for `batch` queries took: the median over the repeats, and the best."""

    kind: str
    retriever: str
    threads: int
    batch: int
    repeats: int
    median_s: float
    best_s: float


def real_queries(retriever: Retriever, count: int, seed: int = 0) -> list[Query]:
    """Pieces of the passages' own text, as long as a query of in-context RaLM; encoded. Blocking."""
    draw = random.Random(seed)
    texts: list[str] = []
    while len(texts) < count:
        words = retriever.document(draw.randrange(len(retriever))).text.split()
        start = draw.randrange(max(1, len(words) - WORDS))
        if piece := " ".join(words[start : start + WORDS]):
            texts.append(piece)
    return retriever.encode([Query(text=text) for text in texts])


def batch_costs(
    kind: str,
    retriever: Retriever,
    queries: Sequence[Query],
    batches: Sequence[int],
    *,
    threads: int,
    k: int = 20,
    seconds: float = 1.0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[BatchCost]:
    """Time batches of every size, the sizes interleaved so that drift of the machine hits all alike.

    Every batch holds other queries than the one before. Each size gets at least five repeats and about `seconds`.
    Blocking. Raises `ValueError` where there are fewer queries than the largest batch needs.
    """
    if max(batches) > len(queries):
        raise ValueError(f"a batch of {max(batches)} needs as many queries; there are {len(queries)}")
    taken: dict[int, list[float]] = {batch: [] for batch in batches}
    at = 0
    for batch in batches:  # warm up: pages, caches, and a just-in-time compiler where there is one
        retriever.search(queries[:batch], k)
    while unfinished := [b for b, times in taken.items() if len(times) < 5 or sum(times) < seconds]:
        for batch in unfinished:
            progress(f"{kind}, {threads} threads, batch {batch}")
            chosen = [queries[(at + n) % len(queries)] for n in range(batch)]
            at += batch
            start = time.perf_counter()
            retriever.search(chosen, k)
            taken[batch].append(time.perf_counter() - start)
    return [
        BatchCost(
            kind=kind,
            retriever=retriever.description,
            threads=threads,
            batch=batch,
            repeats=len(times),
            median_s=float(np.median(times)),
            best_s=min(times),
        )
        for batch, times in taken.items()
    ]
