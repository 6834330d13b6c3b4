"""How much work of model and index really runs side by side on these cores."""

import threading
import time
from collections.abc import Callable

import numpy as np

from ralmspec.stages.model import Frontier, Prefix, read_to_end

from .engine import Engine


def overlap_efficiency(engine: Engine, seconds: float = 0.5) -> dict[str, float]:
    """Decoding beside searching, on this engine; see `side_by_side`. Blocking; about twelve times `seconds`."""
    session = -7  # no served session has a negative number
    workload = engine.workload.bind(engine.model, engine.index)
    tokens = np.array((engine.model.encode("where two threads meet") * 50)[:200], dtype=np.int64)

    def decode() -> Frontier:
        tokens[-1] = (tokens[-1] + 1) % 50
        return read_to_end(engine.model, Prefix(session=session, tokens=tokens))

    (query,) = engine.index.encode([workload.query(tokens.tolist(), decode())])

    def search() -> None:
        engine.index.search([query], workload.top_k)

    try:
        alone, efficiency = side_by_side(decode, search, seconds)
    finally:
        engine.model.forget(session)
    return {"decode_alone_s": alone[0], "search_alone_s": alone[1], "efficiency": efficiency}


def side_by_side(
    one: Callable[[], object], other: Callable[[], object], seconds: float = 0.5
) -> tuple[tuple[float, float], float]:
    """Time two pieces of work, first one after the other, then in two threads at once.

    Returns the seconds that one call of each takes alone, and the efficiency: (alone_1 + alone_2 − together) /
    min(alone_1, alone_2), so 1 means that the shorter work was free, and 0 or less that two threads were no faster
    than one. Blocking; about twelve times `seconds`.
    """
    for work in (one, other):  # warm up
        work()
    counts = [max(1, round(seconds / _once(work))) for work in (one, other)]
    works = [_repeat(one, counts[0]), _repeat(other, counts[1])]
    alone, together = [float("inf"), float("inf")], float("inf")
    for _ in range(3):  # the best of three: other programs only ever add time
        alone = [min(best, _once(work)) for best, work in zip(alone, works, strict=True)]
        together = min(together, _once(lambda: _both(works)))
    return (alone[0] / counts[0], alone[1] / counts[1]), (sum(alone) - together) / min(alone)


def _repeat(work: Callable[[], object], count: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(count):
            work()

    return repeated


def _both(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _once(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
