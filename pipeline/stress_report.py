"""The JSON that `ralmspec stress` writes; stable for programs that read it."""

import math
import signal
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import BaseModel

from .quantiles import Quantiles
from .reports import environment
from .simulated import SimulatedModel
from .stress import Stress
from .stress_tally import Fate

_CASES = 20


class Slo(BaseModel):
    """What a completed session has to keep to count as good. Seconds."""

    ttft_s: float
    e2e_s: float


class StressReport(BaseModel):
    """What `stress --json` writes. sessions = completed + cancelled + sum(failed) + refused + lost.

    Times in seconds, from a client's arrival, waiting, refusals and retries included; quantiles over completed
    sessions, None without any.
    """

    simulated: bool
    """Whether model and retriever were simulated."""
    seconds: float
    """From the first arrival to the last end."""
    sessions: int
    completed: int
    cancelled: int
    """Given up by their client, as it was told to."""
    failed: dict[str, int]
    """Ended with an error of this library, by type."""
    refused: int
    """Never let in, after all retries."""
    lost: int
    """Ended without `Done` and without an error of this library, or not at all."""
    wrong: int
    """Outputs, or committed beginnings of one, that are not the oracle's, unexplained by a near-tie."""
    leaked: int
    """The sum of the four below."""
    leaked_sessions: int
    """Slots not given back, places in the waiting room, and what the model still holds for a session."""
    leaked_tasks: int
    leaked_threads: int
    leaked_descriptors: int
    checked: int
    """Outputs and committed beginnings that were compared with the oracle's."""
    matched: int
    explained: int
    """Those that differ first at a near-tie of the model's logits."""
    throughput_tok_s: float
    """Committed tokens that clients got, a second."""
    goodput: float
    """Completed sessions that kept the SLO, a second."""
    goodput_share: float
    """The same, of all sessions that were not cancelled."""
    slo: Slo
    p50_ttft_s: float | None
    p95_ttft_s: float | None
    p99_ttft_s: float | None
    p50_token_s: float | None
    """Per session: time for a token after its first commit."""
    p95_token_s: float | None
    p99_token_s: float | None
    p50_e2e_s: float | None
    p95_e2e_s: float | None
    p99_e2e_s: float | None
    refusals: int
    """`Overloaded`, each time."""
    retries: int
    p99_refusal_s: float | None
    rollbacks: int
    wasted_tokens: int
    kb_calls: int
    kb_queries: int
    mean_batch: float | None
    """Sessions a forward pass."""
    injected: dict[str, int]
    """Faults made on purpose, by call and kind."""
    died: str | None
    """What the engine died of."""
    death_to_last_error_s: float | None
    """From the loss of the thread to the last client's `EngineDead`."""
    stopped: str | None
    """The signal that cut the run short."""
    rss_slope_bytes_per_session: float | None
    """Growth of resident memory over the last two thirds of the run; None where it was too short."""
    loop_lag_p99_s: float | None
    cases: list[str]
    """The first of what is wrong, lost or leaked, in words."""
    environment: dict[str, Any]

    @property
    def sound(self) -> bool:
        """Nothing lost, nothing wrong, nothing leaked."""
        return not (self.lost or self.wrong or self.leaked)


def report(stress: Stress) -> StressReport:
    """What a run has measured. Blocking: every mismatch is audited with the model."""
    tally, plan, engine = stress.tally, stress.plan, stress.engine
    seconds = max(stress.seconds, 1e-9)
    audits = [stress.oracle.audit(engine, mismatch) for mismatch in tally.mismatches]
    wrong = [
        f"wrong at token {audit.position} of prompt {mismatch.prompt}, "
        + ("documents differ" if audit.gap is None else f"gap {audit.gap:.2e}")
        for audit, mismatch in zip(audits, tally.mismatches, strict=True)
        if not audit.explained
    ]
    lost = [f"lost ({count}): {why}" for why, count in tally.lost.items()]
    left = stress.left
    leaks = [
        f"leaked {kind}: {name}"
        for kind, names in (("task", left.tasks), ("thread", left.threads), ("descriptor", left.descriptors))
        for name in names.values()
    ]
    leaked = {
        "leaked_sessions": stress.left_sessions,
        "leaked_tasks": len(left.tasks),
        "leaked_threads": len(left.threads),
        "leaked_descriptors": len(left.descriptors),
    }
    dead_after = tally.last_failed.get("EngineDead", math.inf) - stress.killed_at
    return StressReport(
        sessions=tally.ended,
        **{fate.value: tally.fates[fate] for fate in Fate if fate is not Fate.FAILED},
        failed=dict(tally.failed.most_common()),
        wrong=len(wrong),
        leaked=sum(leaked.values()),
        **leaked,
        checked=tally.checked,
        matched=tally.checked - len(audits),
        explained=len(audits) - len(wrong),
        throughput_tok_s=tally.tokens / seconds,
        goodput=tally.kept_slo / seconds,
        goodput_share=tally.kept_slo / max(1, tally.ended - tally.fates[Fate.CANCELLED]),
        slo=Slo(ttft_s=plan.slo_ttft_s, e2e_s=plan.slo_e2e_s),
        **_quantiles(ttft=tally.ttft, token=tally.token, e2e=tally.e2e),
        refusals=tally.refusals,
        retries=tally.retries,
        p99_refusal_s=tally.refusal.at(0.99),
        rollbacks=tally.rollbacks,
        wasted_tokens=tally.wasted_tokens,
        kb_calls=stress.retriever.calls,
        kb_queries=stress.retriever.queries,
        mean_batch=stress.model.mean_batch,
        injected=dict(sorted(stress.faults.made.items())),
        died=stress.died or None,
        death_to_last_error_s=dead_after if math.isfinite(dead_after) else None,
        stopped=None if stress.stopped is None else signal.Signals(stress.stopped).name,
        rss_slope_bytes_per_session=slope(*stress.memory),
        loop_lag_p99_s=tally.lag.at(0.99),
        simulated=stress.simulated,
        seconds=stress.seconds,
        cases=[*wrong, *lost, *leaks][:_CASES],
        environment=environment(
            retriever=engine.description,
            engine=engine.options.facts(),
            model=engine.model.description if isinstance(engine.model, SimulatedModel) else engine.options.model,
            plan=asdict(plan) | {"arrivals": repr(plan.arrivals), "arrangement": repr(plan.arrangement)},
            limits=asdict(stress.limits),
            temperature=stress.oracle.sampling.temperature,
        ),
    )


def slope(ended: Sequence[int], resident: Sequence[int]) -> float | None:
    """Bytes a session, by least squares over all but the first third of the samples; None for too few."""
    first = len(ended) // 3
    x, y = np.array(ended[first:], dtype=np.float64), np.array(resident[first:], dtype=np.float64)
    if len(x) < 8 or np.ptp(x) == 0:
        return None
    return float(np.polyfit(x, y, 1)[0])


def _quantiles(**measured: Quantiles) -> dict[str, Any]:
    return {
        f"p{percent}_{name}_s": quantiles.at(percent / 100)
        for name, quantiles in measured.items()
        for percent in (50, 95, 99)
    }
