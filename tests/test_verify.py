"""Verify and Prefetch: what they ask of the knowledge base, and what becomes of the answer."""

import anyio
from fakes import FakeModel, FakeRetriever, Scattered, fixed

from ralmspec.pipeline import Answer, Arrangement, InContext, Pipeline, Synchronous
from ralmspec.retrievers.base import Ids, Scores


class Reads(Scattered):
    """Remembers which rows were read."""

    def __init__(self) -> None:
        super().__init__(documents=64)
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
