"""KNN-LM as a workload: a plain sequential loop's tokens in every arrangement, and how it comes by them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clocks import VirtualLoop
from fake_datastore import Approximate, FakeDatastore, KeyedModel, Neighbours, knn_world
from fakes import FakeModel, FakeRetriever, Workers, fixed
from oracle import sequential_knn

from ralmspec.pipeline import (
    OS3,
    Arrangement,
    Asynchronous,
    BadModel,
    Continuous,
    KnnLM,
    Pipeline,
    PromptTooLong,
    Ranking,
    Sampling,
    Sequential,
    Synchronous,
)
from ralmspec.stages.generate import Generate
from ralmspec.stages.load import Load
from ralmspec.stages.messages import Check, Decoded, Pass
from ralmspec.stages.model import Frontier
from ralmspec.stages.request import Request

STRIDES: list[int | OS3] = [1, 2, 4, 8, OS3()]
ARRANGEMENTS: dict[str, Arrangement] = {
    "sequential": Sequential(),
    "continuous": Continuous(window=24),
    "continuous, 3 flights": Continuous(window=9, flights=3, prefetch=1),
    **{
        f"{kind.__name__.lower()} s={stride if isinstance(stride, int) else 'OS3'}": kind(speculation_stride=stride)
        for kind in (Synchronous, Asynchronous)
        for stride in STRIDES
    },
}


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
@pytest.mark.parametrize("retriever", [Neighbours, Approximate])
async def test_same_tokens_and_entries(arrangement: Arrangement, retriever: type[Neighbours]) -> None:
    for seed, top_k in enumerate((1, 8, 64, 1024)):
        model, neighbours, workload = knn_world(
            seed=seed, retriever=retriever, ends=seed % 2 == 0, top_k=top_k, successors=(10, 3, 0, 1)[seed]
        )
        neighbours.concurrency = 1 + seed % 3
        sampling = Sampling(temperature=0.7, seed=seed) if seed > 1 else Sampling()
        workers = fixed(model=0.1, index=(0.0, 0.05, 0.3, 2.0)[seed], encoder=0.01, prefetch=0.02)
        async with Pipeline(
            model=model, retriever=neighbours, workload=workload, speculation=arrangement, worker=workers
        ) as pipeline:
            for prompt in ("3 1 4", "15 9 2 6", "5 3 5 8 9 7 9"):
                answer = await pipeline.complete(prompt, max_new_tokens=37, sampling=sampling)
                tokens, nearest = sequential_knn(
                    model, neighbours, workload, model.encode(prompt), max_new_tokens=37, sampling=sampling
                )
                assert list(answer.tokens) == tokens
                assert [step.document.id for step in answer.steps] == nearest
                assert all(len(step.tokens) == 1 for step in answer.steps)
            assert pipeline.live_sessions == 0


def test_what_is_known_is_kept_while_a_prefix_is_read_in_parts() -> None:
    known = Frontier(np.zeros(3))
    model: Any = SimpleNamespace(max_batch=1, forward=lambda prefixes: [None for _ in prefixes])
    workload: Any = SimpleNamespace(prefix=lambda context, retrieved: np.array(context), asks_with_frontier=True)
    stage = Generate({}, model, workload, None, lambda: 0.0, load=Load())  # type: ignore[arg-type]
    stage._choose = lambda made, frontier, position: 1  # type: ignore[method-assign]
    request: Any = Request(prompt=(1,), max_new_tokens=9)
    made = Pass(session=1, epoch=0, step=0, position=0, context=(1,), retrieved=None, frontier=known, request=request)
    (outcome,) = stage.work([made])
    assert isinstance(outcome, Decoded) and outcome.tokens == () and outcome.frontier is known


async def test_a_rollback_repeats_no_forward_pass() -> None:
    """Sequential serving makes one pass for the prompt and one after each token but the last. Speculation adds those
    behind wrong tokens, and no others."""
    for seed in range(4):
        model, neighbours, workload = knn_world(seed=seed)
        passes = {}
        for arrangement in (Sequential(), Synchronous(speculation_stride=4)):
            before = model.passes
            workers = fixed(model=0.1, index=0.3)
            async with Pipeline(
                model=model, retriever=neighbours, workload=workload, speculation=arrangement, worker=workers
            ) as pipeline:
                statistics = (await pipeline.complete("3 1 4", max_new_tokens=30, ignore_eos=True)).statistics
            passes[arrangement] = model.passes - before - statistics.wasted_tokens
            assert arrangement == Sequential() or statistics.rollbacks
        assert set(passes.values()) == {30}


async def test_sequential_serving_waits_for_no_look_up() -> None:
    """There is nothing to encode and no cache to look into."""
    model, neighbours, workload = knn_world()
    workers = Workers(model=0.1, index=0.3, encoder=5.0)
    async with Pipeline(
        model=model, retriever=neighbours, workload=workload, speculation=Sequential(), worker=workers
    ) as pipeline:
        statistics = (await pipeline.complete("3 1 4", max_new_tokens=6, ignore_eos=True)).statistics
    # The prompt is read once; then a search and a pass for every token.
    assert statistics.latency_s == pytest.approx(0.1 + 6 * (0.3 + 0.1))
    assert not workers["encoder"].log


async def test_neighbours_that_differ_do_not_matter_when_the_token_is_the_same() -> None:
    """With a share of 0 the datastore has no say: whatever is guessed is right."""
    model, neighbours, workload = knn_world(interpolation=0.0, successors=0)
    async with Pipeline(
        model=model, retriever=neighbours, workload=workload, speculation=Asynchronous(), worker=fixed(index=0.1)
    ) as pipeline:
        statistics = (await pipeline.complete("3 1 4", max_new_tokens=40, ignore_eos=True)).statistics
    assert statistics.rollbacks == 0 and statistics.gamma == 1.0


async def test_what_follows_a_neighbour_is_guessed() -> None:
    """The datastore is one sentence said twice, so each step's neighbours follow those of the step before."""
    model, neighbours, workload = knn_world(interpolation=1.0, top_k=2, temperature=0.1)
    sentence = np.array([3, 1, 4, 15, 9, 2, 6, 5, 8, 7, 20, 11])
    datastore = FakeDatastore(model)
    datastore.values = np.tile(sentence, 2)[1:].astype(np.int32)
    keys = np.eye(len(sentence), dtype=np.float32)
    datastore.keys = np.tile(keys, (2, 1))[:-1]
    datastore.dimension = model.key_dimension = len(sentence)
    neighbours.vectors = datastore.keys
    place = {int(token): n for n, token in enumerate(sentence)}
    model._frontier = lambda tokens: Frontier(np.zeros(24), keys[place[int(tokens[-1])]])  # type: ignore[method-assign]
    for successors, hits in ((0, 0), (1, 9)):
        workload = KnnLM(datastore=datastore, interpolation=1.0, top_k=2, temperature=0.1, successors=successors)
        async with Pipeline(
            model=model,
            retriever=neighbours,
            workload=workload,
            speculation=Synchronous(speculation_stride=1, prefetch=1),
            worker=fixed(model=0.01, index=0.1),
        ) as pipeline:
            answer = await pipeline.complete("3", max_new_tokens=10)
        assert list(answer.tokens) == sentence[1:11].tolist()
        assert answer.statistics.matched == hits


def bound(**settings: Any) -> Any:
    model, neighbours, workload = knn_world(**settings)
    return workload.bind(model, neighbours)


def test_a_prompt_keeps_its_end_or_is_refused() -> None:
    assert bound(max_prompt_tokens=3).prompt("1 2 3 4 5") == ([3, 4, 5], 2)
    assert bound(max_prompt_tokens=5, truncate=False).prompt("1 2 3 4 5") == ([1, 2, 3, 4, 5], 0)
    with pytest.raises(PromptTooLong, match="5 tokens, 3 are allowed"):
        bound(max_prompt_tokens=3, truncate=False).prompt("1 2 3 4 5")


def test_a_prefix_is_the_context_behind_the_models_own_beginning() -> None:
    model, neighbours, workload = knn_world(max_prompt_tokens=10)
    model.start_tokens = (9, 8)
    served = workload.bind(model, neighbours)
    retrieved = Ranking(np.array([5]), np.zeros(1, dtype=np.float32))
    assert served.prefix([1, 2], None).tolist() == served.prefix([1, 2], retrieved).tolist() == [9, 8, 1, 2]
    assert served.room() == 12


def test_the_mixture_is_a_distribution_made_as_the_formula_says() -> None:
    workload = bound(interpolation=0.3, temperature=5.0)
    workload._values = np.array([7, 7, 2, 9], dtype=np.int32)
    retrieved = Ranking(np.array([0, 2, 1]), np.array([-1.0, -2.0, -6.0], dtype=np.float32))
    logits = np.log(np.arange(1, 25, dtype=np.float64))
    mixed = np.exp(workload.logits(Frontier(logits), retrieved))
    weights = np.exp([-1 / 5, -6 / 5, -2 / 5])
    expected = 0.7 * np.arange(1, 25) / 300
    expected[7] += 0.3 * (weights[0] + weights[1]) / weights.sum()
    expected[2] += 0.3 * weights[2] / weights.sum()
    assert mixed == pytest.approx(expected, rel=1e-12) and mixed.sum() == pytest.approx(1)


def test_a_share_of_one_leaves_only_what_was_found() -> None:
    workload = bound(interpolation=1.0)
    retrieved = Ranking(np.array([3]), np.array([-1e6], dtype=np.float32))
    logits = workload.logits(Frontier(np.zeros(24)), retrieved)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [workload._values[3]] and logits.max() == 0


def test_entries_around_those_found_in_the_order_of_their_worth() -> None:
    workload = bound(successors=2, entries=20)
    assert workload.around(np.array([7, 18, 3])).tolist() == [7, 8, 9, 18, 19, 3, 4, 5]


def test_a_guess_is_right_when_its_token_is() -> None:
    workload = bound(interpolation=1.0, entries=20)
    workload._values = np.array([5, 5, 6], dtype=np.int32)

    def check(guess: int) -> Check:
        return Check(
            session=1,
            epoch=0,
            step=0,
            query=workload.query([], Frontier(np.zeros(24), np.zeros(4, dtype=np.float32))),
            documents=1,
            guess=Ranking(np.array([guess]), np.zeros(1, dtype=np.float32)),
            position=0,
            frontier=Frontier(np.zeros(24)),
            request=Request(prompt=(1,)),
            cache=None,
        )

    truth = Ranking(np.array([0]), np.zeros(1, dtype=np.float32))
    assert workload.agree(check(1), truth) and not workload.agree(check(2), truth)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"top_k": 0}, "top_k=0"),
        ({"successors": -1}, "successors=-1"),
        ({"interpolation": 1.5}, "interpolation=1.5"),
        ({"interpolation": float("nan")}, "interpolation=nan"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        knn_world(**settings)


def test_what_does_not_fit_together_is_refused() -> None:
    model, neighbours, workload = knn_world()
    with pytest.raises(BadModel, match="tells its hidden states"):
        Pipeline(model=FakeModel(), retriever=neighbours, workload=workload)
    with pytest.raises(BadModel, match="another model"):
        Pipeline(model=KeyedModel(seed=9), retriever=neighbours, workload=workload)
    with pytest.raises(ValueError, match=r"12 entries, the datastore holds 400"):
        Pipeline(model=model, retriever=FakeRetriever(documents=12), workload=workload)
