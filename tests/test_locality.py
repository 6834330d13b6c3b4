"""What `bench locality` tells is what RaLMSeq's path and the engine itself show: caches, strides, survival, proofs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bundles import some
from clocks import VirtualLoop
from fakes import AlwaysMisses, FakeModel, FakeRetriever, fixed
from oracle import sequential
from paths import PROMPTS, TOKENS, walker

from ralmspec.pipeline import InContext, Pipeline, Synchronous
from ralmspec.pipeline.locality import Path
from ralmspec.pipeline.locality_guesses import Cached, Drafts, certified, in_strides, right
from ralmspec.retrievers.base import Query, Ranking
from ralmspec.retrievers.drift import product_bound


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("documents", [1, 60, 300])
def test_the_path_is_ralmseqs(documents: int, prompt: str) -> None:
    walks = walker(0, FakeRetriever(documents=documents, dimension=8, spread=5))
    model, retriever = walks.engine.model, walks.engine.retriever
    path = walks.walk(prompt)
    tokens, found = sequential(model, retriever, model.encode(prompt), max_new_tokens=TOKENS, ignore_eos=True)
    assert list(path.context) == model.encode(prompt) + tokens
    assert [step.document for step in path.steps] == found
    assert [step.new_document for step in path.steps] == [a != b for a, b in zip(found, [-1, *found], strict=False)]
    assert [len(step.tokens) for step in path.steps] == [4] * 9 + [1]
    assert all(len(step.wide.ids) == min(40, documents) and step.wide.ids[0] == step.document for step in path.steps)
    assert isinstance(model, FakeModel) and model.forgotten == [-1], "what it kept of the path is freed"


def test_a_cache_guesses_right_where_it_holds_the_document() -> None:
    walks = walker(wide=40)
    rates = []
    for prefetch in (1, 5, 40):
        path = walks.walk(PROMPTS[0])
        guesses = Cached(prefetch=prefetch).guesses(path, walks.engine.index, 4096)
        held: set[int] = set()
        expected = []
        for step in path.steps:
            expected.append(step.document in held)
            held |= {*step.wide.ids[:prefetch].tolist()}
        assert right(guesses, path.steps[1:]) == expected[1:]
        rates.append(sum(expected))
    assert 0 < rates[0] < rates[1] < rates[2], "the world is such that it matters"


def test_neighbours_come_after_what_was_found_and_exist() -> None:
    found = Ranking(np.array([0, 7, 9]), np.array([3, 2, 1], dtype=np.float32))
    takes = Cached(prefetch=2, neighbours=True).takes_in(found, 8)
    assert takes.tolist() == [0, 7, 6, 1]
    assert Cached(prefetch=2).takes_in(found, 8).tolist() == [0, 7]


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
async def test_strides_along_the_path_are_judged_as_the_engine_judges_them(stride: int) -> None:
    """The engine's own γ: the cache it guesses from, the batches it checks, and what wrong paths leave in the cache."""
    judged, without = list[bool](), list[bool]()
    for seed in range(4):
        walks = walker(seed, stubborn=0.3)
        arrangement = Synchronous(speculation_stride=stride, prefetch=5)
        async with Pipeline(
            model=walks.engine.model,
            retriever=walks.engine.retriever,
            workload=InContext(),
            speculation=arrangement,
            worker=fixed(model=0.1, index=0.1),
        ) as pipeline:
            for prompt in PROMPTS:
                answer = await pipeline.complete(prompt, max_new_tokens=TOKENS, ignore_eos=True)
                path = walks.walk(prompt)
                drafts, cached = Drafts(walks, path), Cached(prefetch=5)
                real = in_strides(path, drafts, cached, 4096, stride=stride, wrong_paths=True)
                assert (len(real), sum(real)) == (answer.statistics.checked, answer.statistics.matched)
                judged += real
                without += in_strides(path, drafts, cached, 4096, stride=stride, wrong_paths=False)
    assert 0 < sum(judged) < len(judged)
    if stride == 1:
        assert judged == without, "a stride of 1 drafts nothing after a wrong guess"
    if stride == 3:
        assert judged != without, "this world tells them apart"


def test_a_wrong_guess_survives_as_far_as_its_tokens_are_right() -> None:
    walks = walker(3, AlwaysMisses(), stubborn=0.75)
    path = walks.walk(PROMPTS[1])
    drafts, seen = Drafts(walks, path), set[int]()
    for number in range(1, len(path.steps)):
        guess = Ranking(np.array([number + 100]), np.zeros(1, dtype=np.float32))
        prefix = walks.workload.prefix(path.context[: path.steps[number].begins], guess).tolist()
        own: list[int] = []
        for _ in path.steps[number].tokens:
            assert isinstance(walks.engine.model, FakeModel)
            own.append(int(np.argmax(walks.engine.model.logits([*prefix, *own]))))
        assert drafts.of(number, guess) == tuple(own)
        true = path.steps[number].tokens
        same = max(n for n in range(len(true) + 1) if tuple(own[:n]) == true[:n])
        assert drafts.surviving(number, guess) == same
        seen.add(same)
    assert {0, 1, 4} <= seen, "some survive, some do not"


class Bounded(FakeRetriever):
    """Bounds what a search left out as the real exact index does."""

    longest = 1.0

    def bound(self, query: Query, past: Query, found: Ranking) -> float:
        assert query.vector is not None and past.vector is not None
        return product_bound(query.vector, past.vector, float(found.scores[-1]), self.longest)


class Turning(Bounded):
    """Vectors of about length 1 in bundles, and queries that turn slowly: most answers can be proved."""

    longest = 1.01

    def __init__(self) -> None:
        super().__init__()
        vectors = some()
        lengths = 1 + 1e-3 * np.random.default_rng(3).standard_normal((len(vectors), 1))
        self.vectors = (lengths * vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def walk(self, turn: float) -> Path:
        """A path without tokens whose query turns by about so much a step, from a document on."""
        random, vector, made = np.random.default_rng(1), self.vectors[7].astype(np.float64), []
        source = walker().walk(PROMPTS[0]).steps
        for step in source:
            query = Query(text="", vector=vector.astype(np.float32))
            (wide,) = self.search([query], 200)
            made.append(replace(step, query=query, truth=wide.top(1), wide=wide))
            aside = random.standard_normal(len(vector))
            vector = vector + turn * aside / np.linalg.norm(aside)
            vector /= np.linalg.norm(vector)
        return Path((), tuple(made))


@pytest.mark.parametrize("turn", [0.0, 0.02, 0.1, 0.3, 1.0])
def test_what_is_certified_is_true(turn: float) -> None:
    world = Turning()
    path = world.walk(turn)
    sure = certified(path, world, (5, 20, 200))
    for number, widths in enumerate(sure, start=1):
        for width in widths:
            held = np.unique(
                np.concatenate([step.wide.ids[:width] for step in path.steps[max(0, number - 4) : number]])
            )
            best = held[np.lexsort((held, -world.score(path.steps[number].query, world.rows(held))))[0]]
            assert best == path.steps[number].document
    if turn == 0.0:
        assert all(200 in widths for widths in sure), "a query asked again needs no search"
    if turn == 1.0:
        assert not any(sure), "a query that turned far proves nothing"


def test_the_bound_of_a_certificate_is_no_looser_than_it_must_be() -> None:
    """Three vectors in a plane, of which a search brings two."""

    class Plane(Bounded):
        def __init__(self, degrees: float) -> None:
            super().__init__()
            angles = np.radians([0.0, 40.0, 40.0 + degrees])
            self.vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def walk(*turns: float) -> Path:
        """Queries at these angles; a search finds the first two documents, at 0 and 40 degrees, and not the third."""
        steps = []
        for step, degrees in zip(walker().walk(PROMPTS[0]).steps, turns, strict=False):
            angle = np.radians(degrees)
            query = Query(text="", vector=np.array([np.cos(angle), np.sin(angle)], dtype=np.float32))
            (wide,) = world.search([query], 2)
            steps.append(replace(step, query=query, truth=wide.top(1), wide=wide))
        return Path((), tuple(steps))

    world = Plane(5)
    # Unseen is 40 degrees or more from the first query, so 20.5 or more from the second, whose best is at 19.5.
    assert certified(walk(0.0, 19.5), world, (1, 2)) == [[2]]
    assert certified(walk(0.0, 20.5), world, (1, 2)) == [[]]
    # Only the last four queries are tried.
    assert certified(walk(0.0, 90.0, 90.0, 90.0, 0.0), world, (2,))[-1] == [2]
    assert certified(walk(0.0, 90.0, 90.0, 90.0, 90.0, 0.0), world, (2,))[-1] == []
    # A vector that is longer may score as little before, and more now.
    world.longest = 1.1
    assert certified(walk(0.0, 19.5), world, (1, 2)) == [[]]
    assert certified(walk(0.0, 10.0), world, (1, 2)) == [[2]]
