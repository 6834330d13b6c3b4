"""A drafter guesses beside the cache; the knowledge base's own scores decide, and outputs do not depend on it."""

from typing import Any

import numpy as np
import pytest
from clocks import VirtualLoop
from fakes import AlwaysMisses, FakeModel, FakeRetriever, Guessing, fixed
from oracle import sequential

from ralmspec.pipeline import (
    Answer,
    Arrangement,
    Asynchronous,
    Continuous,
    InContext,
    Pipeline,
    RetrieverFailed,
    Sequential,
    Synchronous,
    published,
)
from ralmspec.retrievers.base import Query, Ranking

PROMPT = "3 1 4 1 5"
TOKENS = 40


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


async def served(retriever: Any, drafter: Any, speculation: Arrangement, *, model: Any = None) -> Answer:
    """Served, with searches of a second and tokens of a tenth; the same tokens as without any guess."""
    model = model or FakeModel(ends=False)
    async with Pipeline(
        model=model,
        retriever=retriever,
        drafter=drafter,
        workload=InContext(),
        speculation=speculation,
        worker=fixed(model=0.1, index=1.0),
    ) as pipeline:
        answer = await pipeline.complete(PROMPT, max_new_tokens=TOKENS)
    tokens, documents = sequential(model, retriever, model.encode(PROMPT), max_new_tokens=TOKENS)
    assert list(answer.tokens) == tokens
    assert [step.document.id for step in answer.steps] == documents
    return answer


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("speculation", [Synchronous(), Asynchronous(), Continuous(), Continuous(token_check=False)])
@pytest.mark.parametrize("spread", [1, 5], ids=["all tie", "ordinary"])
async def test_outputs_do_not_depend_on_it(speculation: Arrangement, right: float, spread: int) -> None:
    retriever = FakeRetriever(documents=300, dimension=8, spread=spread)
    statistics = (await served(retriever, Guessing(retriever, right), speculation)).statistics
    assert right or not statistics.matched_by_drafter, "what it guessed wrong is no hit"


async def test_with_a_drafter_that_is_right_only_the_ends_wait_for_the_index() -> None:
    """The first search is hidden too: ten steps of 0.4 s, and the last verification."""
    retriever = FakeRetriever(documents=300, dimension=8, spread=5)
    statistics = (await served(retriever, Guessing(retriever, 1.0), Continuous())).statistics
    assert statistics.rollbacks == 0 and statistics.matched == statistics.checked == statistics.steps == TOKENS // 4
    assert statistics.latency_s < TOKENS * 0.1 + 2 * 1.0
    slow = (await served(retriever, None, Continuous())).statistics
    assert slow.latency_s >= statistics.latency_s + 1.0 and slow.matched_by_drafter == 0


async def test_the_hits_of_the_cache_are_told_from_those_of_the_drafter() -> None:
    """One document in all: the drafter finds it first, and from then on it is in the cache."""
    retriever = FakeRetriever(documents=1)
    statistics = (await served(retriever, Guessing(retriever, 1.0), Synchronous(speculation_stride=1))).statistics
    assert statistics.matched == TOKENS // 4 and 1 <= statistics.matched_by_drafter <= 2


async def test_the_better_of_both_is_taken_by_the_knowledge_bases_own_scores() -> None:
    """A drafter that always names the worst document never spoils what the cache knows."""
    retriever = FakeRetriever(documents=40, dimension=4, spread=9)

    class Worst(Guessing):
        def _rank(self, query: Query, k: int) -> Ranking:
            scores = retriever.score(query, retriever.vectors)
            return Ranking(np.array([int(scores.argmin())]), np.array([1e9], dtype=np.float32))

    speculation = Synchronous(speculation_stride=1, prefetch=40)
    without = (await served(retriever, None, speculation)).statistics
    worst = (await served(retriever, Worst(retriever), speculation)).statistics
    assert worst.rollbacks <= without.rollbacks + 1, "the very first guess is the drafter's alone"


async def test_what_does_not_ask_it_is_not_given_it() -> None:
    retriever = FakeRetriever(documents=300)
    for speculation in (Sequential(), *published().values(), Continuous(asks_drafter=False)):
        drafter = Guessing(retriever)
        assert (await served(retriever, drafter, speculation)).statistics.matched_by_drafter == 0
        assert not drafter.asked


class Silent(Guessing):
    def _rank(self, query: Query, k: int) -> Ranking:
        return Ranking(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))


async def test_one_that_finds_nothing_guesses_nothing() -> None:
    retriever = FakeRetriever(documents=300, dimension=8, spread=5)
    statistics = (await served(retriever, Silent(retriever), Continuous())).statistics
    assert statistics.matched and not statistics.matched_by_drafter, "the cache guesses as ever"


class Broken(Guessing):
    def search(self, queries: Any, k: int) -> list[Ranking]:
        raise OSError("gone")


class Short(Guessing):
    def search(self, queries: Any, k: int) -> list[Ranking]:
        return []


@pytest.mark.parametrize(
    ("kind", "said"), [(Broken, "drafter's search raised OSError: gone"), (Short, "0 rankings for 1 queries")]
)
async def test_a_fault_of_it_says_whose_it_is(kind: type[Guessing], said: str) -> None:
    retriever = AlwaysMisses()
    with pytest.raises(RetrieverFailed, match=said):
        await served(retriever, kind(retriever), Continuous())


def test_it_must_search_the_same_documents() -> None:
    with pytest.raises(ValueError, match="300"):
        Pipeline(
            model=FakeModel(),
            retriever=FakeRetriever(documents=300),
            drafter=FakeRetriever(documents=299),
        )
