"""The audit of a difference: what counts as the same output, and what may pass for rounding."""

from collections.abc import Sequence

import numpy as np
import pytest
from fake_datastore import knn_world
from fakes import FakeModel, FakeRetriever

from ralmspec.pipeline import Answer, Committed, InContext, Query, Ranking, Sampling
from ralmspec.pipeline.audit import TOLERANCE, Difference, differ
from ralmspec.stages.messages import Source
from ralmspec.stages.model import Frontier, Prefix, Tokens
from ralmspec.stages.statistics import Statistics

STRIDE = 2


class Scores(FakeModel):
    """The same scores everywhere, the two best of them `gap` apart."""

    def __init__(self, gap: float) -> None:
        super().__init__()
        self.gap = gap
        self.prefixes: list[list[int]] = []

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        self.prefixes += [prefix.tokens.tolist() for prefix in prefixes]
        return super().forward(prefixes)

    def _frontier(self, tokens: Tokens) -> Frontier:
        return Frontier(np.array([0.0, 1.0 + self.gap, 1.0]))


class Finds(FakeRetriever):
    """Document 4, whatever is asked; remembers what was."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def _rank(self, query: Query, k: int) -> Ranking:
        self.asked.append(query.text)
        return Ranking(np.array([4]), np.ones(1, dtype=np.float32))


def answer(tokens: Sequence[int], documents: Sequence[int]) -> Answer:
    steps = [
        Committed(session=1, text="", tokens=tuple(tokens[n * STRIDE :][:STRIDE]), step=n, document=Source(id, "", 0.0))
        for n, id in enumerate(documents)
    ]
    return Answer(text="", tokens=tuple(tokens), steps=tuple(steps), statistics=Statistics())


REFERENCE = answer([5, 6, 7, 8], [3, 4])


def audit(
    other: Answer,
    *,
    gap: float = 1.0,
    dtype: str = "float32",
    model: Scores | None = None,
    retriever: FakeRetriever | None = None,
) -> Difference | None:
    model, retriever = model or Scores(gap), retriever or Finds()
    return differ(
        REFERENCE,
        other,
        prompt="1 2",
        model=model,
        retriever=retriever,
        workload=InContext(retrieval_stride=STRIDE).bind(model, retriever),
        sampling=Sampling(),
        dtype=dtype,
    )


def test_the_same_tokens_and_documents_are_the_same_output() -> None:
    assert audit(answer([5, 6, 7, 8], [3, 4])) is None


@pytest.mark.parametrize(("gap", "explained"), [(TOLERANCE["float32"] / 2, True), (TOLERANCE["float32"] * 2, False)])
def test_only_a_near_tie_explains_another_token(gap: float, explained: bool) -> None:
    found = audit(answer([5, 6, 7, 9], [3, 4]), gap=gap)
    assert found is not None and (found.position, found.explained) == (3, explained)
    assert found.gap == pytest.approx(gap)


def test_in_float64_no_gap_explains_anything() -> None:
    found = audit(answer([5, 6, 7, 9], [3, 4]), gap=1e-9, dtype="float64")
    assert found is not None and not found.explained


def test_the_gap_is_taken_under_the_prefix_of_the_reference() -> None:
    model, retriever = Scores(1e-6), Finds()
    audit(answer([5, 6, 7, 9], [3, 4]), model=model, retriever=retriever)
    assert retriever.asked == ["1 2 5 6"], "at the start of the step"
    # Document 4 ("document 4", then "4 0 7"), the prompt, and what was generated before the difference.
    assert model.prefixes == [[4, 4, 0, 7, 1, 2, 5, 6, 7]]
    assert model.forgotten, "the audit keeps nothing in the model's memory"


def test_another_document_is_never_explained_by_the_model() -> None:
    found = audit(answer([5, 6, 7, 9], [3, 5]), gap=1e-9)
    assert found == Difference(3, None, explained=False)


def test_other_documents_count_although_the_tokens_agree() -> None:
    found = audit(answer([5, 6, 7, 8], [3, 5]), gap=1e-9)
    assert found is not None and not found.explained


def test_a_document_that_differs_later_does_not_spoil_the_explanation() -> None:
    found = audit(answer([5, 9, 7, 8], [3, 5]), gap=1e-9)
    assert found is not None and (found.position, found.explained) == (1, True)


@pytest.mark.parametrize("tokens", [[5, 6, 7], [5, 6, 7, 8, 9]])
def test_an_output_of_another_length_is_never_explained(tokens: list[int]) -> None:
    found = audit(answer(tokens, [3, 4]), gap=1.0)
    assert found is not None and not found.explained


def test_where_queries_need_the_frontier_the_gap_is_that_of_the_mixture() -> None:
    model, neighbours, workload = knn_world(top_k=3)
    prompt, tokens = "3 1 4", (5, 6, 7)
    reference, other = (
        Answer(
            text="",
            tokens=(*tokens, last),
            steps=tuple(
                Committed(session=1, text="", tokens=(token,), step=n, document=Source(9, "", 0.0))
                for n, token in enumerate((*tokens, last))
            ),
            statistics=Statistics(),
        )
        for last in (8, 2)
    )
    bound = workload.bind(model, neighbours)
    found = differ(
        reference, other, prompt=prompt, model=model, retriever=neighbours, workload=bound, sampling=Sampling(),
        dtype="float32",
    )  # fmt: skip
    frontier = model._frontier(np.array([3, 1, 4, *tokens]))
    (truth,) = neighbours.search([Query(text="", vector=frontier.key)], 3)
    assert found is not None and found.position == 3
    assert found.gap == Sampling().gap(bound.logits(frontier, truth), 3) != Sampling().gap(frontier.logits, 3)
