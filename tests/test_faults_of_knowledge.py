"""The fault list, F9 and F10: knowledge bases that raise, are late, or answer nonsense. See `test_faults_list.py`."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import anyio
import numpy as np
import pytest
from clocks import run
from fakes import FakeRetriever, fixed
from scenes import PROMPT, exact, expected, opened, until

from ralmspec.pipeline import (
    Committed,
    Query,
    Ranking,
    RetrieverFailed,
    Retrying,
    Sequential,
    Synchronous,
)


class Unsteady(FakeRetriever):
    """Fails the first `failures` times that it is asked something with a 9 in front."""

    def __init__(self, failures: int) -> None:
        super().__init__(documents=40, seed=1, spread=4)
        self.failures = failures
        self.calls: Counter[tuple[str, ...]] = Counter()
        self.lost = 0

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        texts = tuple(query.text for query in queries)
        self.calls[texts] += 1
        if any(text.startswith("9") for text in texts) and self.calls[texts] <= self.failures:
            self.lost += (self.calls[texts] == 3) * len(queries)
            raise TimeoutError("the index is busy")
        return super().search(queries, k)


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_f9_a_failing_search_is_repeated_and_then_fails_its_own_batch(failures: int) -> None:
    """One and two failures cost nobody anything; three (all attempts) cost those who were asked for, and nobody else.
    Others are no slower than without."""

    async def scenario(inner: Unsteady) -> list[float]:
        latencies: list[float] = []

        async def ask(prompt: str) -> None:
            try:
                latencies.append((await exact(pipeline, prompt)).statistics.latency_s)
            except RetrieverFailed as error:
                assert isinstance(error.__cause__, TimeoutError | RetrieverFailed)
                failed.append(prompt)

        retriever = Retrying(inner, attempts=3, first_pause_s=0.0)
        workers = fixed(model=0.01, index=0.02)
        async with (
            opened(retriever=retriever, worker=workers, speculation=Sequential()) as pipeline,
            anyio.create_task_group() as callers,
        ):
            for n in range(200):
                callers.start_soon(ask, f"{n % 8} {n} 1" if n % 20 else f"9 {n} 9")
                await anyio.sleep(0.2)
        return sorted(latencies)

    failed: list[str] = []
    calm, inner = run(scenario, Unsteady(0)), Unsteady(failures)
    assert not failed
    hit = run(scenario, inner)
    assert max(inner.calls.values()) >= failures
    assert len(failed) == inner.lost and len(hit) == 200 - inner.lost
    assert (10 <= inner.lost < 40) == (failures == 3)
    assert hit[int(0.99 * len(hit))] < 1.1 * calm[int(0.99 * len(calm))]


def ranking(ids: Any, scores: Any) -> Ranking:
    return Ranking(np.asarray(ids, dtype=np.int64), np.asarray(scores, dtype=np.float32))


NONSENSE: dict[str, Callable[[list[Ranking], int], Any]] = {
    "a ranking too few": lambda good, k: good[:-1],
    "a ranking too many": lambda good, k: [*good, good[0]],
    "no document": lambda good, k: [ranking([], [])] * len(good),
    "too many documents": lambda good, k: [ranking(range(k + 1), range(k + 1, 0, -1))] * len(good),
    "scores of another shape": lambda good, k: [ranking([1, 2], [1.0])] * len(good),
    "two dimensions": lambda good, k: [ranking([[1]], [[1.0]])] * len(good),
    "NaN": lambda good, k: [ranking([1, 2], [1.0, np.nan])] * len(good),
    "infinity": lambda good, k: [ranking([1], [np.inf])] * len(good),
    "not in order": lambda good, k: [ranking([1, 2], [0.5, 1.0])] * len(good),
    "ties not by id": lambda good, k: [ranking([2, 1], [1.0, 1.0])] * len(good),
    "a document twice": lambda good, k: [ranking([1, 1], [1.0, 1.0])] * len(good),
    "nothing at all": lambda good, k: None,
}


@pytest.mark.parametrize("what", NONSENSE)
@pytest.mark.parametrize("after", [0, 2], ids=["at first", "later"])
def test_f10_nonsense_from_the_knowledge_base_is_a_typed_failure(what: str, after: int) -> None:
    """At the first search and in the middle of a session; nothing wrong is committed, and the engine lives on."""

    class Nonsense(FakeRetriever):
        broken = True

        def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
            good = super().search(queries, k)
            return NONSENSE[what](good, k) if self.broken and len(self.searches) > after else good

    async def scenario() -> None:
        tokens: list[int] = []
        retriever = Nonsense(documents=40, seed=1, spread=4)
        async with opened(retriever=retriever, speculation=Synchronous(speculation_stride=2)) as pipeline:
            with pytest.raises(RetrieverFailed):
                async with pipeline.session(PROMPT) as session:
                    async for event in session:
                        tokens += event.tokens if isinstance(event, Committed) else ()
            retriever.broken = False
            assert tokens == expected(pipeline)[: len(tokens)] and bool(tokens) == (after > 0)
            await until(lambda: not pipeline.live_sessions)
            await exact(pipeline)
            assert pipeline.ready

    run(scenario)


@pytest.mark.parametrize(
    ("where", "what"), [*product(["encode", "rows"], ["too few", "nothing"]), ("score", "nothing")]
)
def test_f10_so_is_nonsense_from_the_other_calls(where: str, what: str) -> None:
    """Too few scores are no failure: they only make guesses worse."""

    async def scenario() -> None:
        retriever: Any = FakeRetriever(documents=40, seed=1, spread=4)
        fine = getattr(retriever, where)
        async with opened(retriever=retriever, speculation=Synchronous(speculation_stride=2)) as pipeline:
            setattr(retriever, where, lambda *given: fine(*given)[:-1] if what == "too few" else None)
            with pytest.raises(RetrieverFailed):
                await pipeline.complete(PROMPT)
            setattr(retriever, where, fine)
            await until(lambda: not pipeline.live_sessions)
            await exact(pipeline)
            assert pipeline.ready

    run(scenario)
