"""Timelines as Chrome trace JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ralmspec.stages.trace import Span

LANES = ("lookup", "generate", "verify", "prefetch")


def events(timelines: Mapping[str, Sequence[Span]]) -> list[dict[str, Any]]:
    """One process a timeline, one lane a stage; spans as complete events, rollbacks as instants. Microseconds."""
    made: list[dict[str, Any]] = []
    for process, (name, spans) in enumerate(timelines.items(), start=1):
        made.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}})
        made += [
            {"ph": "M", "pid": process, "tid": lane, "name": "thread_name", "args": {"name": stage}}
            for lane, stage in enumerate(LANES, start=1)
        ]
        zero = min((span.start for span in spans), default=0.0)
        for span in spans:
            at, took = (span.start - zero) * 1e6, (span.end - span.start) * 1e6
            fields = {"session": span.session, "step": span.step, "epoch": span.epoch, "note": span.note}
            label = f"step {span.step}" + (f" ({span.note})" if span.note else "")
            common = {"pid": process, "ts": at, "args": fields, "cat": span.stage}
            if span.stage in LANES:
                made.append({**common, "ph": "X", "tid": LANES.index(span.stage) + 1, "dur": took, "name": label})
            else:
                made.append({**common, "ph": "i", "tid": 3, "s": "p", "name": f"{span.stage} to {label}"})
    return made


def write(path: Path, timelines: Mapping[str, Sequence[Span]]) -> None:
    """Write a file that Perfetto opens."""
    path.write_text(json.dumps({"traceEvents": events(timelines), "displayTimeUnit": "ms"}))
