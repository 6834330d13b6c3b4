"""SetLatency: every search takes the set time, measured on a clock of the test's own."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ralmspec.retrievers import latency
from ralmspec.retrievers.base import Document, Ids, Query, Ranking, Scores
from ralmspec.retrievers.latency import SetLatency


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Slow:
    """A retriever whose searches take `seconds` on the clock."""

    description = "slow"

    def __init__(self, clock: Clock, seconds: float, concurrency: int = 1) -> None:
        self.clock, self.seconds, self.concurrency = clock, seconds, concurrency
        self.running = self.most = 0
        self.pair: threading.Barrier | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return 3

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        return [Query(text=query.text, vector=np.ones(1, np.float32)) for query in queries]

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        if self.pair is not None:
            with suppress(threading.BrokenBarrierError):
                self.pair.wait()
        self.clock.sleep(self.seconds)
        with self._lock:
            self.running -= 1
        return [Ranking(np.arange(k), np.full(k, len(queries), np.float32)) for _ in queries]

    def rows(self, ids: Ids) -> NDArray[Any]:
        return ids * 2

    def score(self, query: Query, rows: NDArray[Any]) -> Scores:
        return rows.astype(np.float32)

    def document(self, id: int) -> Document:
        return Document(id, "t", "x")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
    return clock


@pytest.mark.parametrize("batch", [1, 16])
def test_a_call_takes_the_set_time_whatever_its_batch(clock: Clock, batch: int) -> None:
    retriever = SetLatency(Slow(clock, 0.1), 0.3)
    (first, *_) = rankings = retriever.search([Query(text="q")] * batch, 2)
    assert clock.now == pytest.approx(100.3)
    assert len(rankings) == batch
    assert first.ids.tolist() == [0, 1]
    assert retriever.overruns == 0


def test_a_late_answer_is_not_delayed_further_and_is_counted(clock: Clock) -> None:
    retriever = SetLatency(Slow(clock, 0.5), 0.3)
    retriever.search([Query(text="q")], 1)
    assert clock.now == pytest.approx(100.5)
    assert retriever.overruns == 1


def test_everything_else_passes_through_at_once(clock: Clock) -> None:
    inner = Slow(clock, 0.1)
    retriever = SetLatency(inner, 0.3, concurrency=4)
    (query,) = retriever.encode([Query(text="q")])
    assert query.vector is not None
    assert len(retriever) == 3
    assert retriever.rows(np.array([1, 2])).tolist() == [2, 4]
    assert retriever.score(query, np.array([5])).tolist() == [5.0]
    assert retriever.document(2) == Document(2, "t", "x")
    assert clock.now == 100.0
    assert retriever.concurrency == 4


def test_reports_call_it_simulated(clock: Clock) -> None:
    assert SetLatency(Slow(clock, 0), 0.3, 2).description == "slow; simulated latency 0.3 s a call, 2 at once"


@pytest.mark.parametrize(("inner", "patience"), [(1, 0.1), (2, 10.0)])
def test_the_real_search_keeps_to_the_inner_concurrency(clock: Clock, inner: int, patience: float) -> None:
    """Each inner search waits for a second one to be inside with it, for as long as its patience lasts."""
    slow = Slow(clock, 0.0, concurrency=inner)
    slow.pair = threading.Barrier(2, timeout=patience)
    retriever = SetLatency(slow, 0.0, concurrency=4)
    threads = [threading.Thread(target=retriever.search, args=([Query(text="q")], 1)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slow.most == inner


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_refuses_a_latency_that_is_none(clock: Clock, seconds: float) -> None:
    with pytest.raises(ValueError, match="0 seconds or more"):
        SetLatency(Slow(clock, 0), seconds)
    with pytest.raises(ValueError, match="at least 1 search"):
        SetLatency(Slow(clock, 0), 1, concurrency=0)
