"""A stress run on a terminal while it goes on, and what came of it."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from .stress import TICK_S, Stress
from .stress_report import StressReport
from .stress_tally import Fate
from .terminal import err

_LINE_S = 5.0


class StressView:
    """Shows a run twice a second where there is a terminal, and else writes a line every five seconds."""

    def __init__(self, live: Live | None) -> None:
        self._live = live
        self._tokens: deque[int] = deque(maxlen=round(_LINE_S / TICK_S) + 1)
        self._ticks = 0

    def tick(self, stress: Stress) -> None:
        """Take a look."""
        self._tokens.append(stress.tally.tokens)
        self._ticks += 1
        if self._live is not None:
            self._live.update(self._table(stress), refresh=True)
        elif self._ticks % round(_LINE_S / TICK_S) == 0:
            line = ", ".join(f"{name} {value}" for name, value in self._facts(stress).items())
            err.print(line, highlight=False, soft_wrap=True)

    def _facts(self, stress: Stress) -> dict[str, str]:
        tally = stress.tally
        rate = (self._tokens[-1] - self._tokens[0]) / (max(1, len(self._tokens) - 1) * TICK_S)
        failed = ", ".join(f"{count} {why}" for why, count in tally.failed.most_common())
        return {
            "s": f"{perf_counter() - stress.began:.0f}",
            "live": str(stress.pipeline.live_sessions),
            "waiting": str(stress.pipeline.waiting_sessions),
            "done": str(tally.fates[Fate.COMPLETED]),
            "cancelled": str(tally.fates[Fate.CANCELLED]),
            "refused": str(tally.fates[Fate.REFUSED]),
            "failed": f"{tally.fates[Fate.FAILED]}{f' ({failed})' if failed else ''}",
            "lost": str(tally.fates[Fate.LOST]),
            "differ": str(len(tally.mismatches)),
            "tok/s": f"{rate:,.0f}",
            "e2e p50": _time(tally.e2e.at(0.5)),
            "p99": _time(tally.e2e.at(0.99)),
            "loop lag p99": _time(tally.lag.at(0.99)),
        }

    def _table(self, stress: Stress) -> Table:
        table = Table(title=_title(stress.simulated), show_header=False)
        for name, value in self._facts(stress).items():
            table.add_row(name, value)
        return table


@contextmanager
def watching() -> Iterator[StressView]:
    """A view for one run, on stderr."""
    if not err.is_terminal:
        yield StressView(None)
        return
    with Live(console=err, auto_refresh=False, transient=True) as live:
        yield StressView(live)


def summary(report: StressReport) -> Table:
    """What came of a run."""
    table = Table(title=_title(report.simulated), show_header=False, caption=escape(report.environment["retriever"]))
    failed = ", ".join(f"{count} {why}" for why, count in report.failed.items())
    fate = f"{report.completed:,} completed, {report.cancelled:,} cancelled, {report.refused:,} refused"
    left = (
        f"{report.leaked_sessions} sessions, {report.leaked_tasks} tasks, {report.leaked_threads} threads, "
        f"{report.leaked_descriptors} descriptors"
    )
    slope = report.rss_slope_bytes_per_session
    rows = {
        "sessions": f"{report.sessions:,} in {report.seconds:.1f} s: {fate}",
        "failed": failed or "none",
        "lost": str(report.lost),
        "wrong": f"{report.wrong} of {report.checked:,} compared: {report.matched:,} identical, "
        f"{report.explained} differ at a near-tie",
        "leaked": left,
        "throughput": f"{report.throughput_tok_s:,.0f} tok/s; "
        + ("no pass" if report.mean_batch is None else f"{report.mean_batch:.1f} sessions a pass"),
        "goodput": f"{report.goodput:.2f} sessions/s, {report.goodput_share:.0%} "
        f"(first token in {report.slo.ttft_s:g} s, end in {report.slo.e2e_s:g} s)",
        "first token": _times(report.p50_ttft_s, report.p95_ttft_s, report.p99_ttft_s),
        "a token": _times(report.p50_token_s, report.p95_token_s, report.p99_token_s),
        "end to end": _times(report.p50_e2e_s, report.p95_e2e_s, report.p99_e2e_s),
        "refusals": f"{report.refusals:,}, p99 {_time(report.p99_refusal_s)}; {report.retries:,} retries",
        "speculation": f"{report.rollbacks:,} rollbacks, {report.wasted_tokens:,} tokens wasted; "
        f"{report.kb_queries:,} queries in {report.kb_calls:,} searches",
        "faults made": ", ".join(f"{count} {kind}" for kind, count in report.injected.items()) or "none",
        "memory": "too short to tell" if slope is None else f"{slope:,.0f} bytes a session",
        "loop lag": f"p99 {_time(report.loop_lag_p99_s)}",
    }
    if report.died:
        after = report.death_to_last_error_s
        rows["died"] = escape(report.died) + ("" if after is None else f"; the last client knew after {_time(after)}")
    if report.stopped:
        rows["stopped by"] = report.stopped
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _title(simulated: bool) -> str:
    return "stress, [yellow]simulated model and retriever[/yellow]" if simulated else "stress"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _times(p50: float | None, p95: float | None, p99: float | None) -> str:
    return f"p50 {_time(p50)}, p95 {_time(p95)}, p99 {_time(p99)}"
