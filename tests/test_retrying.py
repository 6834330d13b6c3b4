"""Retrying: what is repeated, how often, how long, and what comes out in the end; on a clock of the test's own."""

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import FakeRetriever
from test_latency import Clock

from ralmspec.pipeline import BadKnowledge, MissingExtra, Query, Ranking, RetrieverFailed, Retrying
from ralmspec.retrievers import retrying
from ralmspec.retrievers.base import Ids, Scores

QUERY = Query(text="3 1 4")


class Flaky(FakeRetriever):
    """Raises what it was given, one error a call, before it answers; each call takes `seconds` on the clock."""

    def __init__(self, clock: Clock, *errors: Exception, seconds: float = 0.0) -> None:
        super().__init__()
        self.clock, self.errors, self.seconds, self.calls = clock, list(errors), seconds, 0

    def _call(self) -> None:
        self.calls += 1
        self.clock.now += self.seconds
        if self.errors:
            raise self.errors.pop(0)

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        self._call()
        return super().encode(queries)

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        self._call()
        return super().search(queries, k)

    def rows(self, ids: Ids) -> Scores:
        self._call()
        return super().rows(ids)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retrying, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
    return clock


def searched(retriever: Any) -> list[int]:
    encoded = FakeRetriever().encode([QUERY])
    return [int(id) for id in retriever.search(encoded, 3)[0].ids]


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_search_that_fails_now_and_then_is_repeated(clock: Clock, failures: int) -> None:
    inner = Flaky(clock, *[TimeoutError("busy")] * failures)
    assert searched(Retrying(inner)) == searched(FakeRetriever())
    assert inner.calls == 1 + failures
    assert clock.now == pytest.approx(100 + sum((0.05, 0.1)[:failures]))


def test_encoding_and_reading_rows_are_repeated_too(clock: Clock) -> None:
    inner = Flaky(clock, ConnectionError("gone"))
    (query,) = Retrying(inner).encode([QUERY])
    assert query.vector is not None and inner.calls == 2
    inner.errors.append(OSError("gone"))
    assert Retrying(inner).rows(np.array([2])).tolist() == FakeRetriever().rows(np.array([2])).tolist()
    assert inner.calls == 4


def test_pauses_double_and_then_the_last_error_is_the_cause(clock: Clock) -> None:
    errors = [OSError(f"try {n}") for n in range(9)]
    inner = Flaky(clock, *errors)
    with pytest.raises(RetrieverFailed, match=r"the search raised OSError: try 4 \(attempt 5") as failure:
        searched(Retrying(inner, attempts=5, first_pause_s=1, give_up_s=100))
    assert failure.value.__cause__ is errors[4]
    assert clock.now == pytest.approx(100 + 1 + 2 + 4 + 8)


def test_no_attempt_begins_after_the_time_is_up(clock: Clock) -> None:
    inner = Flaky(clock, *[OSError("slow")] * 9, seconds=3.0)
    with pytest.raises(RetrieverFailed, match="attempt 2, given up after 7 s"):
        searched(Retrying(inner, attempts=9, first_pause_s=1, give_up_s=8))
    assert inner.calls == 2 and clock.now == pytest.approx(107)


@pytest.mark.parametrize("error", [ValueError("k"), TypeError("k"), BadKnowledge("file"), MissingExtra("faiss")])
def test_a_mistake_is_not_repeated(clock: Clock, error: Exception) -> None:
    inner = Flaky(clock, error)
    with pytest.raises(type(error)) as raised:
        searched(Retrying(inner))
    assert raised.value is error and inner.calls == 1 and clock.now == 100


def test_only_errors_are_caught(clock: Clock) -> None:
    class Panic(BaseException):
        pass

    inner = Flaky(clock)
    inner._call = lambda: (_ for _ in ()).throw(Panic())  # type: ignore[method-assign]
    with pytest.raises(Panic):
        searched(Retrying(inner))


def test_every_repetition_is_logged(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    searched(Retrying(Flaky(clock, OSError("one"), OSError("two"))))
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "the search raised OSError: one; attempt 2 of 3 in 0.05 s",
        "the search raised OSError: two; attempt 3 of 3 in 0.1 s",
    ]


def test_everything_else_passes_through(clock: Clock) -> None:
    inner = Flaky(clock)
    inner.concurrency = 4
    retriever = Retrying(inner, attempts=2)
    assert (len(retriever), retriever.concurrency) == (12, 4)
    assert retriever.description == "fake; up to 2 attempts a call"
    assert retriever.document(3) == inner.document(3)
    (query,) = FakeRetriever().encode([QUERY])
    assert retriever.score(query, inner.vectors[:2]).tolist() == inner.score(query, inner.vectors[:2]).tolist()
    assert inner.calls == 0


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"first_pause_s": -1.0}, {"give_up_s": float("nan")}])
def test_refuses_what_makes_no_sense(clock: Clock, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Retrying(Flaky(clock), **wrong)
