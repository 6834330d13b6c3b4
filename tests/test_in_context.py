"""In-context RaLM: what of a prompt and a document reaches the model, and how it is said that some did not."""

from collections.abc import Sequence

import numpy as np
import pytest
from fakes import FakeModel, FakeRetriever, Scattered, fixed

from ralmspec.pipeline import (
    DocumentTooLong,
    EmptyPrompt,
    InContext,
    Pipeline,
    PromptTooLong,
    Query,
    Ranking,
    Synchronous,
)
from ralmspec.stages.messages import Check
from ralmspec.stages.request import Request

ONE = np.ones(1, dtype=np.float32)


def test_a_prompt_keeps_its_end() -> None:
    workload = InContext(max_prompt_tokens=3).bind(FakeModel(), FakeRetriever())
    assert workload.prompt("1 2 3") == ([1, 2, 3], 0)
    assert workload.prompt("1 2 3 4 5") == ([3, 4, 5], 2)


def test_a_huge_prompt_is_cut_before_it_is_tokenised() -> None:
    class Counts(FakeModel):
        longest = 0

        def encode(self, text: str) -> list[int]:
            self.longest = max(self.longest, len(text))
            return super().encode(text)

    model = Counts()
    workload = InContext(max_prompt_tokens=4).bind(model, FakeRetriever())
    tokens, cut = workload.prompt("1 " * 1_000_000 + "5 6 7 8")
    assert tokens == [5, 6, 7, 8]
    assert cut == pytest.approx(1_000_000, rel=0.02), "the share never tokenised is estimated, and counted as cut"
    assert model.longest < 1000


@pytest.mark.parametrize("prompt", ["1 2 3 4", "1 " * 1_000_000])
def test_a_prompt_too_long_is_refused_where_that_is_asked_for(prompt: str) -> None:
    workload = InContext(max_prompt_tokens=3, truncate=False).bind(FakeModel(), FakeRetriever())
    assert workload.prompt("1 2 3") == ([1, 2, 3], 0)
    with pytest.raises(PromptTooLong, match="3"):
        workload.prompt(prompt)


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(EmptyPrompt):
        InContext().bind(FakeModel(), FakeRetriever()).prompt(prompt)


def test_the_query_is_the_end_of_the_context() -> None:
    workload = InContext(query_tokens=2).bind(FakeModel(), FakeRetriever())
    assert workload.query([1, 2, 3], None).text == "2 3"
    assert InContext().bind(FakeModel(), FakeRetriever()).query(range(40), None).text.split()[0] == "8", "32 tokens"


def test_the_document_stands_first_and_only_the_newest() -> None:
    model = FakeModel()
    model.start_tokens = (9,)
    workload = InContext().bind(model, FakeRetriever())
    # Document 5: the title "document 5", then the text "5 0 7".
    assert workload.prefix([1, 2], Ranking(np.array([5]), ONE)).tolist() == [9, 5, 5, 0, 7, 1, 2]
    assert workload.prefix([1, 2], Ranking(np.array([6, 5]), ONE)).tolist() == [9, 6, 6, 0, 7, 1, 2]


def test_a_document_keeps_its_beginning() -> None:
    workload = InContext(max_document_tokens=3).bind(FakeModel(), FakeRetriever())
    retrieved = Ranking(np.array([5]), ONE)
    assert workload.prefix([1], retrieved).tolist() == [5, 5, 0, 1]
    assert workload.tokens_cut(retrieved) == 1
    assert InContext(max_document_tokens=4).bind(FakeModel(), FakeRetriever()).tokens_cut(retrieved) == 0


def test_a_document_too_long_is_refused_by_name() -> None:
    workload = InContext(max_document_tokens=3, truncate=False).bind(FakeModel(), FakeRetriever())
    with pytest.raises(DocumentTooLong, match="document 5.*4 tokens, 3 are allowed"):
        workload.prefix([1], Ranking(np.array([5]), ONE))


def test_the_room_that_the_model_must_have() -> None:
    model = FakeModel()
    model.start_tokens = (9,)
    assert InContext(max_prompt_tokens=10, max_document_tokens=20).bind(model, FakeRetriever()).room() == 31


def test_guesses_agree_by_their_first_document() -> None:
    workload = InContext().bind(FakeModel(), FakeRetriever())
    request = Request(prompt=(1,))
    for guess, right in ((5, True), (6, False)):
        guessed = Ranking(np.array([guess]), ONE)
        check = Check(
            session=1,
            epoch=0,
            step=0,
            query=Query(text=""),
            documents=1,
            guess=guessed,
            position=0,
            frontier=None,
            request=request,
            cache=None,
        )
        assert workload.agree(check, Ranking(np.array([5, 6]), ONE)) is right


@pytest.mark.parametrize("name", ["retrieval_stride", "query_tokens", "max_prompt_tokens", "max_document_tokens"])
def test_a_size_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        InContext(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_what_was_cut_is_in_the_statistics() -> None:
    workload = InContext(retrieval_stride=2, max_prompt_tokens=2, max_document_tokens=3)
    async with Pipeline(
        model=FakeModel(ends=False), retriever=FakeRetriever(), workload=workload, worker=fixed()
    ) as pipeline:
        statistics = (await pipeline.complete("1 2 3 4 5", max_new_tokens=7)).statistics
    assert (statistics.prompt_tokens, statistics.prompt_tokens_cut) == (2, 3)
    assert statistics.documents_cut == statistics.steps == 4, "every document has 4 tokens"


@pytest.mark.anyio
async def test_a_query_is_encoded_once_for_guess_and_check() -> None:
    class Counts(Scattered):
        encoded = 0

        def encode(self, queries: Sequence[Query]) -> list[Query]:
            self.encoded += len(queries)
            return super().encode(queries)

    retriever = Counts()
    async with Pipeline(
        model=FakeModel(ends=False),
        retriever=retriever,
        workload=InContext(retrieval_stride=2),
        speculation=Synchronous(speculation_stride=3),
        worker=fixed(),
    ) as pipeline:
        statistics = (await pipeline.complete("1 2 3", max_new_tokens=40)).statistics
    assert statistics.rollbacks > 0, "the rollbacks are part of the case"
    assert retriever.encoded == statistics.kb_queries, "one vector serves guess and check; no step is encoded again"
