"""Verify and Prefetch: what they ask of the knowledge base, and what becomes of the answer."""

import anyio
import numpy as np
from fakes import FakeModel, FakeRetriever, Scattered, VirtualWorker, fixed

from ralmspec.pipeline import Answer, Arrangement, InContext, Pipeline, Query, Ranking, Synchronous
from ralmspec.retrievers.base import Ids, Scores
from ralmspec.retrievers.cache import SessionCache
from ralmspec.stages.messages import Check, Verdict
from ralmspec.stages.prefetch import Prefetch
from ralmspec.stages.request import Request
from ralmspec.stages.verify import Verify


def judged(cache: SessionCache, retriever: FakeRetriever, guesses: list[int], prefetch: int) -> list[Verdict]:
    """What Verify says of a batch of checks, one for each guess, and of what is put into the cache."""
    workload = InContext().bind(FakeModel(), retriever)
    stage = Verify({}, retriever, workload, VirtualWorker("index", lambda name: 0.0), lambda: 0.0)
    queries = retriever.encode([Query(text=f"{n} {n + 1} {n}") for n in range(len(guesses))])
    checks = tuple(
        Check(
            session=1,
            epoch=0,
            step=n,
            query=query,
            documents=prefetch,
            guess=Ranking(np.array([guess]), np.zeros(1, dtype=np.float32)) if guess >= 0 else None,
            position=n,
            frontier=None,
            request=Request(prompt=(1,)),
            cache=cache,
        )
        for n, (query, guess) in enumerate(zip(queries, guesses, strict=True))
    )
    (verdicts,) = stage.work([checks])
    assert not isinstance(verdicts, Exception)
    return verdicts


def test_what_is_found_enters_the_cache_after_a_wrong_guess_too_but_not_as_the_newest() -> None:
    retriever = Scattered(documents=400)
    truths = [int(retriever.search(retriever.encode([Query(text=f"{n} {n + 1} {n}")]), 1)[0].ids[0]) for n in range(4)]
    assert len(set(truths)) == 4
    cache = SessionCache(retriever, 4)
    verdicts = judged(cache, retriever, [truths[0], 399, truths[2], truths[3]], prefetch=6)
    assert [verdict.right for verdict in verdicts] == [True, False, True, True]
    assert all(truth in cache for truth in truths)
    for verdict, truth in zip(verdicts, truths, strict=True):
        assert len(verdict.wanted) >= 3 and truth not in verdict.wanted and all(i not in cache for i in verdict.wanted)
    cache.insert(np.array([398, 397]), retriever.rows(np.array([398, 397])))
    assert [truth in cache for truth in truths] == [True, True, False, False], "the wrong path goes first"


def test_a_first_retrieval_has_no_guess_to_judge() -> None:
    retriever = Scattered(documents=400)
    (verdict,) = judged(SessionCache(retriever), retriever, [-1], prefetch=1)
    assert not verdict.right and not len(verdict.wanted)


class Reads(Scattered):
    """Remembers which rows were read."""

    def __init__(self, documents: int = 64) -> None:
        super().__init__(documents=documents)
        self.read: list[list[int]] = []

    def rows(self, ids: Ids) -> Scores:
        self.read.append(ids.tolist())
        return super().rows(ids)


async def serve(retriever: FakeRetriever, speculation: Arrangement, *prompts: str) -> list[Answer]:
    answers: list[Answer] = []
    async with (
        Pipeline(
            model=FakeModel(ends=False),
            retriever=retriever,
            workload=InContext(retrieval_stride=2, query_tokens=3),
            speculation=speculation,
            worker=fixed(index=0.01),
        ) as pipeline,
        anyio.create_task_group() as tasks,
    ):

        async def one(prompt: str) -> None:
            answers.append(await pipeline.complete(prompt, max_new_tokens=24))

        for prompt in prompts:
            tasks.start_soon(one, prompt)
    return answers


async def test_the_checks_of_a_stride_are_one_search() -> None:
    retriever = FakeRetriever(documents=1)  # every guess after the first is right
    (answer,) = await serve(retriever, Synchronous(speculation_stride=3), "1 2 3")
    assert retriever.searches == [1, 3, 3, 3, 2]
    assert (answer.statistics.kb_calls, answer.statistics.kb_queries) == (5, 12)


async def test_sessions_share_searches() -> None:
    retriever = FakeRetriever(documents=1)
    answers = await serve(retriever, Synchronous(speculation_stride=3), *(f"{n} 1" for n in range(8)))
    assert sum(retriever.searches) == 8 * 12
    assert max(retriever.searches) >= 8 and len(retriever.searches) < 8 * 5
    assert all(answer.statistics.kb_queries == 12 for answer in answers)


async def test_prefetch_fills_the_cache_and_makes_guesses_right() -> None:
    narrow, wide = FakeRetriever(documents=40, spread=8), FakeRetriever(documents=40, spread=8)
    (few,) = await serve(narrow, Synchronous(speculation_stride=3, prefetch=1), "1 2 3 4 5 6")
    (many,) = await serve(wide, Synchronous(speculation_stride=3, prefetch=40), "1 2 3 4 5 6")
    assert few.tokens == many.tokens
    assert few.statistics.rollbacks > 0
    assert many.statistics.rollbacks == 0, "after the first search every document is in the cache"


async def test_prefetch_reads_what_the_cache_lacks_and_nothing_twice() -> None:
    retriever = Reads()
    await serve(retriever, Synchronous(speculation_stride=3, prefetch=20), "1 2 3")
    wide = [ids for ids in retriever.read if len(ids) > 1]
    assert wide, "a search brings 20, one of them with the verdict"
    seen: set[int] = set()
    for ids in wide:
        assert len(set(ids)) == len(ids) and seen.isdisjoint(ids)
        seen |= {*ids}


def test_what_is_wanted_most_is_fetched_last_and_stays_longest() -> None:
    cache, retriever = fetched(2000, capacity=2000)
    assert len(retriever.read) > 1, "in pieces"
    cache.insert(np.arange(2000, 2500), retriever.rows(np.arange(2000, 2500)))
    assert cache.missing(np.arange(2000)).tolist() == [*range(1500, 2000)]


def test_no_more_is_fetched_than_the_cache_holds() -> None:
    cache, retriever = fetched(2900, capacity=1500)
    assert sum(len(ids) for ids in retriever.read) == 1500
    assert cache.missing(np.arange(2900)).tolist() == [*range(1500, 2900)]


def fetched(wanted: int, *, capacity: int) -> tuple[SessionCache, Reads]:
    """What one call for documents 0, 1, 2, ... leaves, the first ones wanted most."""
    retriever = Reads(documents=3000)
    cache = SessionCache(retriever, capacity)
    stage = Prefetch({}, retriever, VirtualWorker("prefetch", lambda name: 0.0), lambda: 0.0)
    assert stage.work([(cache, np.arange(wanted))]) == [min(wanted, capacity)]
    return cache, retriever


def test_a_search_for_several_brings_as_many_as_the_one_that_wants_most() -> None:
    retriever = FakeRetriever(documents=50)
    workload = InContext().bind(FakeModel(), retriever)
    stage = Verify({}, retriever, workload, VirtualWorker("index", lambda name: 0.0), lambda: 0.0)
    (query,) = retriever.encode([Query(text="1 2 3")])
    one, many = (
        Check(
            session=session,
            epoch=0,
            step=0,
            query=query,
            documents=documents,
            guess=None,
            position=0,
            frontier=None,
            request=Request(prompt=(1,)),
            cache=None,
        )
        for session, documents in ((1, 1), (2, 7))
    )
    for verdicts in stage.work([(one,), (many,)]):
        assert not isinstance(verdicts, Exception) and len(verdicts[0].truth.ids) == 7
