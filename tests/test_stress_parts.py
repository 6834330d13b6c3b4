"""The parts of a stress run, one by one: clocks, clients, answers that are drawn, faults, quantiles, leaks."""

import itertools
import math
import mmap
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from ralmspec.pipeline import (
    Asynchronous,
    Committed,
    InContext,
    ModelFailed,
    Pipeline,
    Query,
    Sampling,
    Sequential,
)
from ralmspec.pipeline.arrivals import ClosedLoop, OpenLoop
from ralmspec.pipeline.command_stress import StressOptions
from ralmspec.pipeline.engine import Engine
from ralmspec.pipeline.injected_faults import LATE_S, Faults, FaultyModel, FaultyRetriever, Injected
from ralmspec.pipeline.leaks import Footprint, left_behind, resident_bytes
from ralmspec.pipeline.metered import MeteredModel, MeteredRetriever
from ralmspec.pipeline.quantiles import Quantiles
from ralmspec.pipeline.simulated import VOCABULARY, SimulatedModel, SimulatedRetriever, direct_answer, simulated_engine
from ralmspec.pipeline.stress_oracle import Oracle, right_answers
from ralmspec.pipeline.stress_report import slope
from ralmspec.pipeline.traffic import GivesUp, Traffic, mixed_prompts
from ralmspec.stages.messages import Source
from ralmspec.stages.model import Frontier, Prefix
from ralmspec.stages.verify import validate


def simulated() -> Engine:
    return simulated_engine(StressOptions(), SimulatedModel())


# Arrivals and traffic ------------------------------------------------------------------------------------------------


def gaps(bursty: bool, seed: int = 0) -> np.ndarray[Any, Any]:
    loop = OpenLoop(phases=((math.inf, 10.0),), bursty=bursty)
    instants = [0.0, *itertools.islice(loop.instants(seed), 20_000)]
    return np.diff(instants)


@pytest.mark.parametrize(("bursty", "spread"), [(False, 1.0), (True, 4.0)])
def test_gaps_have_the_mean_and_the_spread_that_are_said(bursty: bool, spread: float) -> None:
    drawn = gaps(bursty)
    assert drawn.min() >= 0
    assert drawn.mean() == pytest.approx(0.1, rel=0.1)
    assert drawn.std() / drawn.mean() == pytest.approx(spread, rel=0.1)
    assert (gaps(bursty) == drawn).all() and (gaps(bursty, seed=1) != drawn).any(), "a seed decides"


def test_phases_follow_each_other_and_end() -> None:
    instants = np.array([*OpenLoop(phases=((100, 2), (50, 40), (100, 2))).instants(3)])
    assert (np.diff(instants) >= 0).all() and instants[-1] <= 250
    counts = [((instants >= a) & (instants < b)).sum() for a, b in ((0, 100), (100, 150), (150, 250))]
    assert counts == [pytest.approx(n, rel=0.3) for n in (200, 2000, 200)]


@pytest.mark.parametrize("phases", [(), ((0.0, 1.0),), ((1.0, 0.0),), ((1.0, math.inf),), ((-1.0, 2.0),)])
def test_a_clock_that_makes_no_sense_is_refused(phases: Any) -> None:
    with pytest.raises(ValueError, match="phases"):
        OpenLoop(phases=phases)


def test_a_closed_loop_has_at_least_one_client() -> None:
    with pytest.raises(ValueError, match="concurrency=0"):
        ClosedLoop(concurrency=0)


def test_a_client_is_the_same_whatever_came_before_it() -> None:
    traffic = Traffic(prompts=16, max_new_tokens=32, cancel_rate=0.1, slow_reader_rate=0.3, seed=4)
    visits = [traffic.visit(number) for number in range(5000)]
    assert traffic.visit(17) == visits[17]
    assert Counter(visit.max_new_tokens for visit in visits).keys() == {8, 16, 32}
    assert {visit.prompt for visit in visits} == set(range(16))
    gives_up = Counter(visit.gives_up for visit in visits if visit.gives_up)
    assert gives_up.total() == pytest.approx(500, rel=0.2) and gives_up.keys() == set(GivesUp)
    assert sum(visit.slow for visit in visits) == pytest.approx(1500, rel=0.2)


def test_prompts_have_mixed_lengths_and_a_seed_decides() -> None:
    prompts = mixed_prompts(simulated(), 20, 1)
    lengths = [len(prompt.split()) for prompt in prompts]
    assert sum(6 <= n <= 24 for n in lengths) == 12 and lengths.count(64) == 6 and lengths.count(256) == 2
    assert prompts == mixed_prompts(simulated(), 20, 1) != mixed_prompts(simulated(), 20, 2)


# The simulated engine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_the_direct_answer_is_the_pipelines(temperature: float) -> None:
    engine, sampling = simulated(), Sampling(temperature=temperature, seed=5)
    for prompt in mixed_prompts(engine, 10, 0):
        direct = direct_answer(prompt, InContext(), max_new_tokens=22, sampling=sampling)
        for speculation in (Sequential(), Asynchronous(prefetch=20)):
            async with Pipeline(model=engine.model, retriever=engine.retriever, speculation=speculation) as pipeline:
                answer = await pipeline.complete(prompt, max_new_tokens=22, sampling=sampling)
            assert answer.tokens == direct.tokens
            assert [s.document.id for s in answer.steps] == [s.document.id for s in direct.steps]


def test_every_token_tells_its_document() -> None:
    """Under another document, or after another token, nearly every token is another."""
    model = SimulatedModel()

    def next_tokens(document: int, last: int = 9) -> list[int]:
        prefixes = [Prefix(session=1, tokens=np.array([document, 5, n, n, last])) for n in range(200)]
        return [int(frontier.logits.argmax()) for frontier in model.forward(prefixes) if isinstance(frontier, Frontier)]

    assert len(set(next_tokens(1))) > 150, "drawn from all there are"
    assert sum(a == b for a, b in zip(next_tokens(1), next_tokens(2), strict=True)) <= 3
    assert sum(a == b for a, b in zip(next_tokens(1), next_tokens(1, 8), strict=True)) <= 3
    assert next_tokens(1) == next_tokens(1)


async def test_guesses_are_sometimes_right_and_sometimes_wrong() -> None:
    engine = simulated()
    checked = matched = 0
    async with Pipeline(model=engine.model, retriever=engine.retriever, speculation=Asynchronous()) as pipeline:
        for prompt in mixed_prompts(engine, 8, 0):
            statistics = (await pipeline.complete(prompt, max_new_tokens=64)).statistics
            checked, matched = checked + statistics.checked, matched + statistics.matched
    assert checked > 50 and 0.5 < matched / checked < 0.85


def test_scores_are_exact_and_searches_promise_what_retrievers_promise() -> None:
    retriever = SimulatedRetriever()
    queries = retriever.encode([Query(text=" ".join(map(str, range(n, n + 32)))) for n in range(20)])
    together = retriever.search(queries, 50)
    for query, ranking in zip(queries, together, strict=True):
        validate(ranking, 50)
        assert (ranking.scores == np.rint(ranking.scores)).all()
        assert (retriever.score(query, retriever.rows(ranking.ids)) == ranking.scores).all()
        (alone,) = retriever.search([query], 7)
        assert (alone.ids == ranking.ids[:7]).all()
    texts = {retriever.document(id).text for id in range(len(retriever))}
    assert len(texts) == len(retriever)
    model = SimulatedModel()
    numbers = {model.encode(retriever.document(id).title)[0] for id in range(len(retriever))}
    assert len(numbers) == len(retriever) <= VOCABULARY, "documents are told apart by their first token"


def test_latencies_are_slept_and_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    model, retriever = SimulatedModel(pass_s=0.5, session_s=0.1), SimulatedRetriever(call_s=1.0, query_s=0.25)
    prefix = Prefix(session=1, tokens=np.array([3, 4]))
    model.forward([prefix])
    model.forward([prefix] * 3)
    retriever.search(retriever.encode([Query(text="1")] * 2), 1)
    assert slept == pytest.approx([0.5, 0.7, 1.5])
    SimulatedModel().forward([prefix])
    assert len(slept) == 3, "nothing is slept where nothing was set"
    assert "simulated; 0.5 s a pass" in model.description and "simulated" in retriever.description


# The oracle ----------------------------------------------------------------------------------------------------------


def oracle() -> Oracle:
    prompts = mixed_prompts(simulated(), 3, 0)
    work = partial(right_answers, simulated(), prompts, max_new_tokens=32, sampling=Sampling())
    return anyio.run(work)


def cut(steps: Sequence[Committed], tokens: int) -> list[Committed]:
    kept: list[Committed] = []
    for step in steps:
        if tokens > 0:
            kept.append(
                Committed(session=1, text="", tokens=step.tokens[:tokens], step=step.step, document=step.document)
            )
        tokens -= len(step.tokens)
    return kept


def test_an_answer_and_its_beginning_are_right() -> None:
    right = oracle()
    steps = right.answers[1].steps
    for tokens in (32, 30, 8):
        assert right.mismatch(1, cut(steps, tokens), tokens) is None, "a shorter answer"
    assert right.mismatch(1, cut(steps, 12), None) is None, "the beginning of one that was cut off"
    assert right.mismatch(1, [], None) is None


def test_what_is_short_long_or_other_is_found_and_audited() -> None:
    right, engine = oracle(), simulated()
    steps = right.answers[1].steps
    short = right.mismatch(1, cut(steps, 28), 32)
    long = right.mismatch(1, cut(steps, 12), 8)
    stranger = Committed(session=1, text="", tokens=steps[1].tokens, step=1, document=Source(999, "", 0.0))
    document = right.mismatch(1, [steps[0], stranger], None)
    forged = Committed(session=1, text="", tokens=(1, 2, 3, 4), step=1, document=steps[1].document)
    token = right.mismatch(1, [steps[0], forged], None)
    for mismatch in (short, long, document, token):
        assert mismatch is not None
        assert not right.audit(engine, mismatch).explained
    assert token is not None and right.audit(engine, token).gap == 1.0


# Faults --------------------------------------------------------------------------------------------------------------


class Always(random.Random):
    """Chooses one thing whenever it can be chosen."""

    def __init__(self, kind: str) -> None:
        super().__init__(0)
        self.kind = kind

    def random(self) -> float:
        return 0.0

    def choice(self, kinds: Any) -> Any:
        assert self.kind in kinds
        return self.kind


def always(kind: str) -> Faults:
    faults = Faults(1.0, 0)
    faults._chance = Always(kind)
    return faults


PREFIXES = [Prefix(session=n, tokens=np.array([n, 1, 2])) for n in range(3)]


def forward(kind: str) -> list[Frontier | Exception | None]:
    return FaultyModel(SimulatedModel(), always(kind)).forward(PREFIXES)


def test_faults_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(Injected, match="forward"):
        forward("raises")
    assert len(forward("late")) == 3 and slept == [LATE_S]
    assert len(forward("short")) == 2
    first, second, _ = forward("nan")
    assert isinstance(first, Frontier) and np.isnan(first.logits).all()
    assert isinstance(second, Frontier) and np.isfinite(second.logits).all()
    first, second, _ = forward("shape")
    assert isinstance(first, Frontier) and first.logits.shape == (1, VOCABULARY)
    first, second, _ = forward("fails one")
    assert isinstance(first, ModelFailed) and isinstance(second, Frontier)


def test_faults_of_the_retriever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    inner = SimulatedRetriever()
    queries = inner.encode([Query(text="1 2 3"), Query(text="4 5 6")])
    raises = FaultyRetriever(inner, always("raises"))
    with pytest.raises(Injected, match="encode"):
        raises.encode(queries)
    with pytest.raises(Injected, match="search"):
        raises.search(queries, 3)
    with pytest.raises(Injected, match="rows"):
        raises.rows(np.array([1, 2]))
    assert len(FaultyRetriever(inner, always("short")).encode(queries)) == 1
    assert len(FaultyRetriever(inner, always("short")).rows(np.array([1, 2]))) == 1
    assert len(FaultyRetriever(inner, always("short")).search(queries, 3)) == 1
    for kind in ("shape", "nan", "order"):
        wrong, right = FaultyRetriever(inner, always(kind)).search(queries, 3)
        validate(right, 3)
        with pytest.raises(Exception, match="ranking"):
            validate(wrong, 3)


def test_faults_come_as_often_as_they_should_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    faults = Faults(0.1, 7)
    for _ in range(5000):
        with suppress(Injected):
            faults.draw("search", "nan")
    assert faults.made.keys() == {"search raises", "search late", "search nan"}
    assert faults.made.total() == pytest.approx(500, rel=0.2)
    faults.made.clear()
    for _ in range(5000):
        with suppress(Injected):
            faults.draw("rows", share=0.1)
    assert faults.made.total() == pytest.approx(50, rel=0.4)
    assert Faults(0.0, 7).draw("search", "nan") == ""


def test_meters_count_and_everything_else_passes_through() -> None:
    model, retriever = MeteredModel(SimulatedModel(batch=7)), MeteredRetriever(SimulatedRetriever())
    before = model.mean_batch
    model.forward(PREFIXES)
    model.forward(PREFIXES[:1])
    assert (model.passes, model.prefixes, model.frontiers, before, model.mean_batch) == (2, 4, 4, None, 2.0)
    assert model.forward_s > 0 and model.max_batch == 7 and model.decode([1, 2]) == "1 2"
    retriever.search(retriever.encode([Query(text="1"), Query(text="2")]), 3)
    assert (retriever.calls, retriever.queries, len(retriever), retriever.concurrency) == (1, 2, 1000, 1)


# Figures -------------------------------------------------------------------------------------------------------------


def test_quantiles_are_right_to_half_a_per_cent_in_little_memory() -> None:
    values = np.random.default_rng(0).lognormal(-2, 1.5, 50_000)
    quantiles = Quantiles()
    for value in values:
        quantiles.add(value)
    for share in (0.5, 0.95, 0.99, 1.0):
        exact = float(np.quantile(values, share, method="inverted_cdf"))
        assert quantiles.at(share) == pytest.approx(exact, rel=0.0051)
    assert quantiles.count == 50_000 and len(quantiles._buckets) < 2000


def test_no_measurement_has_no_quantile_and_nothing_counts_as_a_microsecond() -> None:
    quantiles = Quantiles()
    assert quantiles.at(0.5) is None
    quantiles.add(0.0)
    assert quantiles.at(0.99) == pytest.approx(1e-6, rel=0.01)


def test_the_slope_of_memory_leaves_the_warm_up_out() -> None:
    ended = [*range(0, 3000, 100)]
    resident = [1_000_000 + (50_000_000 if n < 1000 else 50_000_000 + 24 * n) for n in ended]
    assert slope(ended, resident) == pytest.approx(24)
    assert slope(ended[:6], resident[:6]) is None and slope([5] * 30, resident) is None


async def test_what_is_left_behind_is_found_by_kind(tmp_path: Path) -> None:
    before = Footprint.now()
    assert len(await left_behind(before, 0.1)) == 0
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            await anyio.lowlevel.checkpoint()
            left = await left_behind(before, 0.05)
            tasks.cancel_scope.cancel()
    finally:
        os.close(descriptor)
        release.set()
        thread.join()
    assert (len(left.tasks), len(left.threads), len(left.descriptors), len(left)) == (1, 1, 1, 3)
    assert len(await left_behind(before, 0.5)) == 0


async def test_what_ends_in_a_moment_is_not_left_behind() -> None:
    before = Footprint.now()
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    threading.Timer(0.05, release.set).start()
    assert len(await left_behind(before)) == 0
    thread.join()


def test_resident_memory_grows_with_what_is_held() -> None:
    size = 64_000_000
    before = resident_bytes()
    # Pages of its own: an allocator may hand out memory that it never gave back, and nothing would grow.
    with mmap.mmap(-1, size) as held:
        held.write(b"\1" * size)
        assert resident_bytes() - before > 0.5 * size
