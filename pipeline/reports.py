"""The JSON that `compare` and `verify-lossless` write; stable for programs that read it."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel


class Row(BaseModel):
    """One arrangement in a comparison. Times in seconds, means over questions unless said otherwise."""

    arrangement: str
    retriever: str
    speedup: float
    """Ratio of mean latencies, RaLMSeq over this (the paper's speed-up)."""
    speedup_low: float
    """95 % bootstrap interval of `speedup` over questions."""
    speedup_high: float
    latency_s: float
    time_to_first_token_s: float
    f_ideal: float
    """T_decode / T: what a retriever without cost would leave of the time."""
    f_miss: float
    """T* / T: what waiting only for the first retrieval and real misses would leave of the time."""
    gamma: float | None
    """Share of guesses, judged or proven, that were right; None where nothing was guessed."""
    cache_hits: int
    """Right guesses of the sessions' caches."""
    drafter_hits: int
    """Right guesses of the drafter, where the cache alone had no or another document."""
    certified: int
    """Steps whose guess was proven by an earlier search, and not checked."""
    saved: int
    """Steps written under other documents than the true ones, whose tokens stood all the same."""
    rollbacks: int
    kb_calls: int
    kb_queries: int
    wasted_tokens: int
    identical: int
    """Outputs equal to RaLMSeq's, token for token and document for document."""
    explained: int
    """Outputs that differ first at a near-tie of the model's logits (see `verify-lossless`)."""
    outputs: int


class Comparison(BaseModel):
    """What `compare --json` writes."""

    environment: dict[str, Any]
    rows: list[Row]


class Case(BaseModel):
    """An output that differs from RaLMSeq's."""

    question: str
    arrangement: str
    position: int
    """First differing generated token."""
    gap: float | None
    """Difference of the two best scores there, under RaLMSeq's prefix; None where the documents already differ."""
    tolerance: float
    explained: bool
    """Same documents up to there, and the gap is within the tolerance."""


class Losslessness(BaseModel):
    """What `verify-lossless --json` writes."""

    environment: dict[str, Any]
    outputs: int
    identical: int
    explained: int
    arrangements: list[str]
    cases: list[Case]


def environment(**facts: Any) -> dict[str, Any]:
    """Date, machine, its load over the last minute (this run included) and versions, with the facts of a run."""
    versions = {}
    for package in ("ralmspec", "anyio", "faiss-cpu", "numpy", "sentence-transformers", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions,
        **facts,
    }
