"""b(batch) is timed as its docstring says: warm, interleaved, with other queries every time, by median and best."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from fakes import FakeRetriever

from ralmspec.pipeline import batch_cost
from ralmspec.pipeline.batch_cost import WORDS, BatchCost, batch_costs, real_queries
from ralmspec.retrievers.base import Document, Query, Ranking


class Timed(FakeRetriever):
    """A search for n queries takes n seconds, and a hundred more the first time; the clock is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.asked: list[tuple[list[str], int]] = []
        self.slow = 100.0

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        self.now += len(queries) + self.slow / (1 + 10 * len(self.asked))
        self.asked.append(([query.text for query in queries], k))
        return []


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    retriever = Timed()
    monkeypatch.setattr(batch_cost, "time", SimpleNamespace(perf_counter=lambda: retriever.now))
    return retriever


def some(count: int) -> list[Query]:
    return [Query(text=f"{number}") for number in range(count)]


def test_sizes_take_turns_after_a_warm_up_of_each(timed: Timed) -> None:
    told: list[str] = []
    costs = batch_costs("fake", timed, some(4), [1, 4], threads=2, k=7, seconds=0, progress=told.append)
    assert [len(texts) for texts, _ in timed.asked] == [1, 4] + [1, 4] * 5
    assert {k for _, k in timed.asked} == {7}
    assert told == ["fake, 2 threads, batch 1", "fake, 2 threads, batch 4"] * 5
    assert [(cost.kind, cost.retriever, cost.threads) for cost in costs] == [("fake", "fake", 2)] * 2
    assert [(cost.batch, cost.repeats) for cost in costs] == [(1, 5), (4, 5)]


def test_the_warm_up_is_not_counted_and_the_median_and_the_best_are_told(timed: Timed) -> None:
    (cost,) = batch_costs("fake", timed, some(2), [2], threads=1, seconds=0)
    times = sorted(2 + 100 / (1 + 10 * number) for number in range(1, 6))
    assert isinstance(cost, BatchCost)
    assert cost.best_s == pytest.approx(times[0])
    assert cost.median_s == pytest.approx(times[2])


def test_each_size_goes_on_until_it_has_its_seconds(timed: Timed) -> None:
    timed.slow = 0
    small, large = batch_costs("fake", timed, some(10), [1, 10], threads=1, seconds=30)
    assert (small.repeats, large.repeats) == (30, 5)
    assert (small.median_s, large.median_s) == (1, 10)


def test_no_batch_repeats_the_queries_of_the_one_before(timed: Timed) -> None:
    batch_costs("fake", timed, some(5), [1, 2], threads=1, seconds=0)
    measured = [texts for texts, _ in timed.asked[2:]]
    assert all(not {*one} & {*other} for one, other in zip(measured, measured[1:], strict=False))
    assert {text for texts in measured for text in texts} == {query.text for query in some(5)}, "all are used in turn"


def test_too_few_queries_are_refused_before_anything_is_searched(timed: Timed) -> None:
    with pytest.raises(ValueError, match="a batch of 4 needs as many queries; there are 3"):
        batch_costs("fake", timed, some(3), [1, 4], threads=1)
    assert timed.asked == []


class Library(FakeRetriever):
    """Three passages: one longer than a query, one shorter, one without a word."""

    texts = (" ".join(f"long{n}" for n in range(60)), "short and sweet", "   ")

    def __init__(self) -> None:
        super().__init__(documents=3)
        self.encodings = 0

    def document(self, id: int) -> Document:
        return Document(id, "", self.texts[id])

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        self.encodings += 1
        return list(queries)


def test_queries_are_pieces_of_passages_and_encoded_together() -> None:
    library = Library()
    texts = [query.text for query in real_queries(library, 200)]
    assert len(texts) == 200
    assert library.encodings == 1
    longer = [text for text in texts if text.startswith("long")]
    assert {len(text.split()) for text in longer} == {WORDS}
    assert all(text in library.texts[0] for text in longer)
    assert len({*longer}) > 20, "they begin anywhere"
    assert {*texts} - {*longer} == {"short and sweet"}


def test_the_same_seed_draws_the_same_queries() -> None:
    drawn = [[query.text for query in real_queries(Library(), 20, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == [query.text for query in real_queries(Library(), 20)]
