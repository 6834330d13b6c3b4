"""throughput.py and overload.py on a simulated engine: what they write, and how overload is judged."""

import importlib.util
import json
import re
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from ralmspec.pipeline.stress_report import StressReport
from ralmspec.pipeline.stress_tally import Ended, Fate

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert isinstance(spec, ModuleSpec) and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(name: str, *arguments: str) -> str:
    app = typer.Typer()
    app.command()(load(name).main)
    result = CliRunner().invoke(app, [*arguments, "--simulate", "--max-new-tokens", "8", "--prompts", "3"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_throughput_writes_both_tables(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs ralmspec[bench]")
    out = tmp_path / "throughput"
    said = shown("throughput", "--sessions", "1,4", "--seconds", "1.2", "--prefix", "20", "--out", str(out))
    made = json.loads(out.with_suffix(".json").read_text())
    assert [phase["sessions"] for phase in made["phases"]] == [1, 4]
    one, four = (phase["decode_tok_s"] for phase in made["phases"])
    assert 2 < four / one < 4, "a simulated pass of four takes 6.5 ms, one of one 5 ms"
    levels = [(level["sessions"], level["arrangement"]) for level in made["levels"]]
    assert all(level["round"] == 0 for level in made["levels"])
    assert levels == [(count, name) for count in (1, 4) for name in ("RaLMSeq", "+PSA", "continuous", "adaptive")]
    for level in made["levels"]:
        assert level["tok_s"] > 0 and level["forward_tok_s"] > level["tok_s"] / 2
        assert (level["made"]["lost"], level["made"]["wrong"], level["made"]["leaked"]) == (0, 0, 0)
        assert level["made"]["checked"] == level["made"]["matched"] > 0
    text = out.with_suffix(".md").read_text()
    assert text.startswith("SIMULATED") and "| 4 | continuous |" in text and "decode over one" in said
    assert out.with_suffix(".svg").stat().st_size > 1000


def test_throughput_of_several_rounds_has_an_interval(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs ralmspec[bench]")
    out = tmp_path / "throughput"
    shown("throughput", "--sessions", "4", "--seconds", "1.2", "--rounds", "3", "--prefix", "20", "--out", str(out))
    made = json.loads(out.with_suffix(".json").read_text())
    rounds = [level["round"] for level in made["levels"] if level["arrangement"] == "continuous"]
    lines = out.with_suffix(".md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| 4 | ")][1:]  # the first is of the model alone
    ratios = {row[1]: row[3] for row in rows}
    assert rounds == [0, 1, 2] and len(ratios) == 4
    assert ratios["RaLMSeq"] == "1.00 (1.00-1.00)"
    share, low, high = (float(figure) for figure in re.findall(r"[0-9.]+", ratios["continuous"]))
    rates = {name: [one["tok_s"] for one in made["levels"] if one["arrangement"] == name] for name in ratios}
    assert share == pytest.approx(sum(rates["continuous"]) / sum(rates["RaLMSeq"]), abs=0.006)
    assert low <= share <= high


def test_overload_surges_and_recovers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs ralmspec[bench]")
    out = tmp_path / "overload"
    said = shown(
        "overload", "--slots", "8", "--waiting", "4", "--patience", "5", "--seconds", "1.5", "--calm", "1",
        "--out", str(out),
    )  # fmt: skip
    made = json.loads(out.with_suffix(".json").read_text())
    assert made["peak"] > 0 and made["made"]["refused"] > 0
    assert made["share"] == pytest.approx(made["surge"] / made["peak"])
    assert (made["made"]["lost"], made["made"]["wrong"], made["made"]["leaked"]) == (0, 0, 0)
    assert len(made["good_each_second"]) == 4 and sum(made["good_each_second"]) > 0
    text = out.with_suffix(".md").read_text()
    assert "SIMULATED" in said and "refused" in text and "8 slots, 4 may wait, for 5 s at most." in text
    assert out.with_suffix(".svg").stat().st_size > 1000


def ended(arrived: float, e2e_s: float, fate: Fate = Fate.COMPLETED, kept_slo: bool = True) -> Ended:
    return Ended(fate=fate, why="", arrived=arrived, ttft_s=e2e_s / 2, e2e_s=e2e_s, kept_slo=kept_slo)


def test_overload_is_judged_by_seconds() -> None:
    """Calm for 10 s, a surge of 20 s, calm for 10 s; two clients a second, ten in the surge, of whom eight are refused
    until 2 s after it."""
    calm = [ended(second + n / 2, 1.0) for second in range(10) for n in range(2)]
    surge = [ended(10 + n / 10, 3.0 if n % 5 == 0 else 0.0, Fate.COMPLETED if n % 5 == 0 else Fate.REFUSED, n % 5 == 0)
             for n in range(200)]  # fmt: skip
    late = [ended(30.5, 0.0, Fate.REFUSED, False), ended(31.5, 2.0), *(ended(32 + n / 2, 1.0) for n in range(16))]
    made = StressReport.model_construct()
    found = load("overload").measured([*calm, *surge, *late], 2.5, 10.0, 20.0, made)
    assert found.before == pytest.approx((20 - 2) / 10), "two end after it"
    assert found.surge == pytest.approx((40 - 6 + 2) / 20) and found.share == pytest.approx(1.8 / 2.5)
    assert found.recovery_s == 3.0, "in the first second somebody is refused, in the next it still takes longer"
    assert sum(found.good_each_second) == 20 + 40 + 17 - 2, "two end after the last second"
    never = load("overload").measured([*calm, *surge, *late[:2]], 2.5, 10.0, 20.0, made)
    assert never.recovery_s is None
