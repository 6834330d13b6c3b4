# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Perplexity under KNN-LM: what serving computes, token for token; and settings that no other settings beat."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TEXT, tiny_model

from ralmspec.pipeline import BadKnowledge, KnnLM, Query, Ranking
from ralmspec.pipeline.mixture import mixture, tuned
from ralmspec.pipeline.perplexity import Evidence, Text, bits_per_byte, gather, perplexity
from ralmspec.retrievers.datastore import Datastore
from ralmspec.retrievers.datastore_build import DatastoreOptions, build_datastore
from ralmspec.retrievers.windows import Windows
from ralmspec.stages.model import Prefix, read_to_end

pytest.importorskip("torch", reason="needs ralmspec[local]")
pytest.importorskip("faiss", reason="needs ralmspec[local]")

from ralmspec.stages.transformers_model import TransformersModel

WINDOW, CONTEXT = 24, 8
WORDS = TEXT.split()


def sentences(seed: int, count: int) -> str:
    """The same words in another order, a paragraph a line."""
    generator = np.random.default_rng(seed)
    return "".join(" ".join(generator.choice(WORDS, 9)) + ".\n" for _ in range(count))


@dataclass
class World:
    model: TransformersModel
    datastore: Datastore
    retriever: Any
    stored: Text
    held_out: Text

    def windows(self, text: Text) -> Windows:
        return Windows(text.tokens[:-1], window=WINDOW, context=CONTEXT, start=self.model.start_tokens)

    def gather(self, text: Text, **settings: Any) -> Evidence:
        given = {"positions": 10**6, "top_k": 40} | settings
        retriever = given.pop("retriever", self.retriever)
        return gather(self.model, retriever, self.datastore.values, text.tokens, self.windows(text), **given)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    made: dict[str, World] = {}

    def make(family: str) -> World:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            (folder / "stored.txt").write_text(sentences(0, 30))
            (folder / "held_out.txt").write_text(sentences(1, 8))
            model = TransformersModel.load(tiny_model(family, folder), dtype="float64")
            options = DatastoreOptions(window=WINDOW, context=CONTEXT)
            build_datastore([folder / "stored.txt"], folder / "datastore", model, options)
            datastore = Datastore.open(folder / "datastore")
            texts = [Text.read(folder / name, model) for name in ("stored.txt", "held_out.txt")]
            made[family] = World(model, datastore, datastore.retriever(), *texts)
        return made[family]

    return make


@pytest.mark.parametrize("family", ["llama", "opt"])  # OPT's windows begin with a token of its own
def test_it_is_what_serving_computes(world, family: str) -> None:
    """A plain loop: a forward pass, a search and the workload's own formula for each token."""
    here: World = world(family)
    model, tokens = here.model, here.held_out.tokens.tolist()
    evidence = here.gather(here.held_out)
    assert len(evidence.log_p) == len(tokens) - 1, "every token but the first is predicted"
    settings = [(1, 0.3, 1.0), (8, 0.5, 2.0), (40, 0.9, 30.0), (40, 0.0, 1.0)]
    workloads = [
        (top_k, KnnLM(datastore=here.datastore, top_k=top_k, interpolation=share, temperature=temperature))
        for top_k, share, temperature in settings
    ]
    stride = WINDOW - len(model.start_tokens) - CONTEXT
    expected = np.empty((len(settings), len(tokens) - 1))
    for place in range(len(tokens) - 1):
        begin = max(0, (place - CONTEXT) // stride) * stride
        prefix = np.array([*model.start_tokens, *tokens[begin : place + 1]])
        frontier = read_to_end(model, Prefix(session=0, tokens=prefix))
        for row, (top_k, workload) in enumerate(workloads):
            bound = workload.bind(model, here.retriever)
            [ranking] = here.retriever.search([bound.query((), frontier)], top_k)
            expected[row, place] = bound.logits(frontier, ranking)[tokens[place + 1]]
    model.forget(0)
    for row, (top_k, share, temperature) in enumerate(settings):
        np.testing.assert_allclose(evidence.mixed(top_k, share, temperature), expected[row], atol=1e-4)
    np.testing.assert_allclose(evidence.log_p, expected[-1], atol=1e-9, err_msg="a share of 0 is the model alone")


def test_the_datastores_own_text_is_known_by_heart(world) -> None:
    here: World = world("llama")
    evidence = here.gather(here.stored, positions=400)
    assert len(evidence.log_p) == 400 and evidence.scores[:, 0].min() > -0.05, "every state is there, but for rounding"
    share, temperature = tuned(evidence, 8)
    assert share > 0.95
    found = mixture(evidence, here.stored, top_k=8, interpolation=share, temperature=temperature)
    assert found.perplexity < 1.5 < perplexity(evidence.log_p)
    assert found.ratio == pytest.approx(found.perplexity / perplexity(evidence.log_p))
    assert found.ratio_low < found.ratio < found.ratio_high < 0.1


class Told:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, *call: Any) -> None:
        self.calls.append(call)


def test_positions_are_spread_over_the_text(world) -> None:
    """Which ones were taken is seen from what the model said there."""
    here: World = world("llama")
    every = here.gather(here.stored, top_k=1)
    for count in (100, 101, 333, len(every.log_p) - 1, len(every.log_p)):
        told = Told()
        some = here.gather(here.stored, positions=count, top_k=1, tell=told)
        places = np.flatnonzero(np.isin(every.log_p, some.log_p))
        assert (len(some.log_p), len(places)) == (count, count), "each once"
        np.testing.assert_array_equal(every.log_p[places], some.log_p, err_msg="in the text's order")
        np.testing.assert_array_equal(every.scores[places], some.scores)
        assert places[0] < 60 and places[-1] > len(every.log_p) - 60
        assert np.diff(places).max() < 4 * WINDOW * max(1, len(every.log_p) / 128 / count), "no large gap"
        for part in ("reading", "searching"):
            steps = [done for name, done, total in told.calls if name == part and total == count]
            assert steps[0] == 0 and steps[-1] == count and steps == sorted(steps)
    with pytest.raises(ValueError, match="at least 100"):
        here.gather(here.stored, positions=99)


def test_a_search_may_bring_less(world) -> None:
    here: World = world("llama")

    class Few:
        def search(self, queries: list[Query], k: int) -> list[Ranking]:
            rankings = here.retriever.search(queries, k)
            return [ranking.top(3 + number % 2) for number, ranking in enumerate(rankings)]

    full, few = here.gather(here.held_out), here.gather(here.held_out, retriever=Few())
    assert full.brought(40) == 40 and few.brought(2) == 2
    assert few.brought(40) == pytest.approx(3.5, abs=0.01)
    np.testing.assert_array_equal(few.p_knn(40, 5.0)[0::2], full.p_knn(3, 5.0)[0::2])
    np.testing.assert_array_equal(few.p_knn(40, 5.0)[1::2], full.p_knn(4, 5.0)[1::2])


def drawn(seed: int = 0, *, n: int = 600, k: int = 16, scale: float = 1.0, offset: float = 0.0) -> Evidence:
    """Neighbours that are right the more often the nearer they are, and a model that is sometimes sure."""
    generator = np.random.default_rng(seed)
    distances = np.sort(generator.gamma(4.0, 5.0, (n, k)), axis=1)
    right = generator.random((n, k)) < np.exp(-distances / 8) * generator.integers(0, 2, (n, 1))
    log_p = -generator.gamma(2.0, 2.0, n)
    return Evidence(log_p=log_p, scores=(-(distances * scale + offset)).astype(np.float32), right=right)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e5, 0.0), (1e-5, 0.0), (1.0, 1e4), (1e-2, 5e3)])
@pytest.mark.parametrize("top_k", [1, 4, 16])
def test_no_setting_on_a_grid_beats_the_tuned_one(top_k: int, scale: float, offset: float) -> None:
    """Wherever the temperature has to lie: with a large offset it is thousands of times smaller than a distance."""
    evidence = drawn(scale=scale, offset=offset)
    share, temperature = tuned(evidence, top_k)
    least = -evidence.mixed(top_k, share, temperature).mean()
    grid = [
        -evidence.mixed(top_k, other, heat).mean()
        for other in np.linspace(0.0, 0.99, 34)
        for heat in scale * np.geomspace(0.3, 300, 31)
    ]
    assert least <= min(grid) + 1e-5
    assert 0.05 < share < 0.95 and least < -evidence.log_p.mean() - 0.05, "there was something to find"
    if top_k > 1:
        assert 0.5 * scale < temperature < 100 * scale


def test_useless_neighbours_get_no_share() -> None:
    evidence = drawn()
    useless = Evidence(log_p=evidence.log_p, scores=evidence.scores, right=np.zeros_like(evidence.right))
    share, temperature = tuned(useless, 16)
    assert share == 0 and temperature > 0
    here = Text(name="", tokens=np.zeros(9, dtype=np.int32), bytes=18)
    same = mixture(useless, here, top_k=16, interpolation=share, temperature=temperature)
    assert (same.ratio, same.ratio_low, same.ratio_high) == (1, 1, 1)
    worse = mixture(useless, here, top_k=16, interpolation=0.5, temperature=temperature)
    assert worse.ratio == pytest.approx(2) == worse.ratio_low
    never = mixture(useless, here, top_k=16, interpolation=1.0, temperature=temperature)
    assert never.perplexity == never.ratio == never.ratio_high == math.inf


def test_neighbours_that_are_always_right_get_everything() -> None:
    evidence = drawn()
    evidence = Evidence(log_p=evidence.log_p, scores=evidence.scores, right=np.ones_like(evidence.right))
    assert tuned(evidence, 16)[0] == 1.0


def test_equal_distances_leave_the_temperature_open() -> None:
    evidence = drawn()
    scores = np.zeros_like(evidence.scores)
    share, temperature = tuned(Evidence(log_p=evidence.log_p, scores=scores, right=evidence.right), 16)
    assert 0 < share < 1 and 0 < temperature < math.inf


def test_the_interval_holds_the_true_mean_19_times_in_20() -> None:
    """Gains that come in runs, as a text's do: five tokens gain or lose together, 0.1 on average."""
    here, generator, held = Text(name="", tokens=np.zeros(9, dtype=np.int32), bytes=18), np.random.default_rng(0), 0
    scores, right = np.zeros((2000, 1), dtype=np.float32), np.ones((2000, 1), dtype=np.bool_)
    for _ in range(300):
        gains = np.repeat(generator.uniform(-0.3, 0.5, 400), 5)
        p = 0.5 / (np.exp(gains) - 0.5)  # (0.5 + 0.5 p) / p, all neighbours being right, is e to the gain
        evidence = Evidence(log_p=np.log(p), scores=scores, right=right)
        found = mixture(evidence, here, top_k=1, interpolation=0.5, temperature=1.0)
        held += found.ratio_low < math.exp(-0.1) < found.ratio_high
    assert 270 <= held <= 298


def test_texts_are_read_as_a_datastores_are(world, tmp_path: Path) -> None:
    here: World = world("llama")
    path = tmp_path / "text.txt"
    path.write_bytes("Zwölf\r\n".encode() * 40)
    text = Text.read(path, here.model)
    assert here.model.decode(text.tokens.tolist()) == "Zwölf\n" * 40
    assert text.bytes == 40 * len("Zwölf\n".encode())
    log_p = np.full(len(text.tokens), -1.5)
    assert bits_per_byte(log_p, text) * text.bytes == pytest.approx(1.5 * len(text.tokens) / math.log(2))
    path.write_text("too short\n")
    with pytest.raises(BadKnowledge, match=r"text\.txt: has .* tokens"):
        Text.read(path, here.model)
    with pytest.raises(BadKnowledge, match="no such file"):
        Text.read(tmp_path / "nowhere.txt", here.model)
