"""Many sessions at once: tokens a second at 1, 4, 16 and 64 of them, what a batch gains, and memory.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --model FOLDER --data FOLDER --seconds 20 --rounds 6 --out throughput

Two parts on one engine. Phases: the model alone reads prefixes of equal length, then decodes, so many sessions at a
time. Closed loop: RaLMSeq, RaLMSpec with all of the paper's techniques (+PSA), `continuous` and `adaptive`, with as
many clients as sessions, and the same clients in the same order for all of them. With --rounds each is served so
often, in a new order every round, and ratios get a 95 % bootstrap interval over rounds. Many short rounds are better
than a few long ones: a shared machine gets faster and slower by a tenth within a minute or two. Every output is
compared with RaLMSeq's own. Tokens that the model reads for each that is committed do not depend on the machine, and
tell whether speculation made it work. What overload does is measured by overload.py.

Needs ralmspec[demo], or --simulate, and ralmspec[bench] for the plot of --out.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import numpy as np
import typer
from rich.console import Console

from ralmspec.pipeline import Adaptive, Continuous, Sampling, Speculation, published
from ralmspec.pipeline.arrivals import ClosedLoop
from ralmspec.pipeline.command_stress import StressOptions
from ralmspec.pipeline.engine import Engine, open_engine
from ralmspec.pipeline.reports import environment
from ralmspec.pipeline.simulated import SimulatedModel, simulated_engine
from ralmspec.pipeline.stress import Plan, Stress
from ralmspec.pipeline.stress_oracle import Oracle, right_answers
from ralmspec.pipeline.stress_report import StressReport, report
from ralmspec.pipeline.traffic import Traffic, mixed_prompts
from ralmspec.stages.model import Prefix

DEMO = Path(__file__).parent.parent / "examples" / "demo"
ARRANGEMENTS: dict[str, Callable[[], Speculation]] = {
    "RaLMSeq": lambda: published()["RaLMSeq"],
    "+PSA": lambda: published()["+PSA"],
    "continuous": Continuous,
    "adaptive": Adaptive,
}
"""Made anew for each number of clients, so that what adapts begins anew, and keeps what it learned over rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The model alone: tokens a second while it reads and while it decodes, and KV memory a session, if it tells."""

    sessions: int
    prefill_tok_s: float
    decode_tok_s: float
    kv_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One round of one arrangement with so many clients. The rates leave out the first quarter of the time, when
    nothing ends yet, and what comes after it, when clients leave."""

    arrangement: str
    sessions: int
    round: int
    tok_s: float
    forward_tok_s: float
    """Committed tokens for each second inside `model.forward`."""
    read_tokens: float
    """Tokens that went through the model for each that was committed; nan where the model does not tell."""
    cpu_ms: float
    """Processor time of the whole process for each committed token."""
    kv_bytes: int
    """The most KV memory there was, for each live session."""
    made: StressReport


def phase(engine: Engine, sessions: int, length: int, tokens: int) -> Phase:
    """Prefixes that share nothing are read, and then continued with tokens that nobody chose; the best of three."""
    tries = [_phase(engine, sessions, length, tokens) for _ in range(3)]
    return Phase(
        sessions=sessions,
        prefill_tok_s=sessions * length / min(read_s for read_s, _, _ in tries),
        decode_tok_s=sessions * tokens / min(decoded_s for _, decoded_s, _ in tries),
        kv_bytes=max(kv_bytes for _, _, kv_bytes in tries) // sessions,
    )


def _phase(engine: Engine, sessions: int, length: int, tokens: int) -> tuple[float, float, int]:
    """Seconds to read, seconds to decode, bytes held then."""
    model = engine.model
    ids = [-100 - n for n in range(sessions)]  # no served session has a negative number
    rows = np.random.default_rng(0).integers(10, 1000, (sessions, length + tokens))
    try:
        began = time.perf_counter()
        _forward(engine, {id: row[:length] for id, row in zip(ids, rows, strict=True)})
        read = time.perf_counter()
        for n in range(length + 1, length + tokens + 1):
            _forward(engine, {id: row[:n] for id, row in zip(ids, rows, strict=True)})
        decoded = time.perf_counter()
        return read - began, decoded - read, held(engine)
    finally:
        for id in ids:
            model.forget(id)


def _forward(engine: Engine, prefixes: dict[int, Any]) -> None:
    """Every session's frontier, in as many passes as it takes."""
    while prefixes:
        now = [Prefix(session=id, tokens=tokens) for id, tokens in prefixes.items()][: engine.model.max_batch]
        for prefix, outcome in zip(now, engine.model.forward(now), strict=True):
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is not None:
                del prefixes[prefix.session]


def held(engine: Engine) -> int:
    """KV memory in bytes; 0 where the model does not tell."""
    told: Callable[[], int] = getattr(engine.model, "kv_bytes", lambda: 0)
    return told()


def serve(
    engine: Engine,
    name: str,
    speculation: Speculation,
    sessions: int,
    seconds: float,
    traffic: Traffic,
    oracle: Oracle,
    number: int,
) -> Level:
    """One arrangement in a closed loop for so long."""
    looks: list[tuple[float, int, float, float, float]] = []
    kv_bytes = 0

    def tick(stress: Stress) -> None:
        nonlocal kv_bytes
        if seconds / 4 <= (now := time.perf_counter() - stress.began) <= seconds:
            read = getattr(engine.model, "prefilled_tokens", math.nan)
            looks.append((now, stress.tally.tokens, stress.model.forward_s, read, time.process_time()))
        kv_bytes = max(kv_bytes, held(engine) // max(1, stress.pipeline.live_sessions))

    plan = Plan(
        arrivals=ClosedLoop(concurrency=sessions),
        traffic=traffic,
        arrangement=speculation,
        seconds=seconds,
    )
    stress = Stress(engine, plan, oracle, replace(engine.limits, sessions=sessions), tick=tick)
    anyio.run(stress.run, backend_options={"use_uvloop": True})
    took, tokens, forward_s, read, cpu_s = np.subtract(looks[-1], looks[0]) if len(looks) > 1 else [math.nan] * 5
    return Level(
        arrangement=name,
        sessions=sessions,
        round=number,
        tok_s=float(tokens / took),
        forward_tok_s=float(tokens / forward_s),
        read_tokens=float(read / tokens),
        cpu_ms=float(cpu_s / tokens * 1e3),
        kv_bytes=kv_bytes,
        made=report(stress),
    )


def over(mine: Sequence[Level], baseline: Sequence[Level], what: str = "tok_s") -> str:
    """`what` over the baseline's, all rounds together, and the 95 % bootstrap interval over rounds."""
    rates = np.array([[getattr(level, what) for level in levels] for levels in (mine, baseline)])
    told = f"{rates[0].sum() / rates[1].sum():.2f}"
    if (rounds := rates.shape[1]) < 3:
        return told
    drawn = rates[:, np.random.default_rng(0).integers(0, rounds, (2000, rounds))].sum(axis=2)
    low, high = np.quantile(drawn[0] / drawn[1], [0.025, 0.975])
    return f"{told} ({low:.2f}-{high:.2f})"


def markdown(phases: list[Phase], levels: list[Level]) -> list[str]:
    """Two tables. Of several rounds: means, the greatest p99 and the most memory."""
    heads = ["sessions", "prefill tok/s", "decode tok/s", "decode over one", "KV MB a session"]
    lines = ["The model alone:", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [
        f"| {phase.sessions} | {phase.prefill_tok_s:,.0f} | {phase.decode_tok_s:,.0f} | "
        f"{phase.decode_tok_s / phases[0].decode_tok_s:.2f} | {phase.kv_bytes / 1e6:.2f} |"
        for phase in phases
    ]
    heads = ["sessions", "arrangement", "tok/s", "over RaLMSeq", "tok/s inside forward", "sessions a pass"]
    heads += ["tokens read a token", "CPU ms a token", "over RaLMSeq"]
    heads += ["p50 s", "p99 s", "first token p50 s", "KV MB a session", "identical"]
    lines += ["", "Closed loop:", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    rows: dict[tuple[int, str], list[Level]] = {}
    for level in levels:
        rows.setdefault((level.sessions, level.arrangement), []).append(level)
    for (sessions, name), rounds in rows.items():
        reports = [level.made for level in rounds]
        rate, inside, read, cpu_ms = (
            np.mean([getattr(level, key) for level in rounds])
            for key in ("tok_s", "forward_tok_s", "read_tokens", "cpu_ms")
        )
        baseline = rows[sessions, "RaLMSeq"]
        times = (
            np.mean([report.p50_e2e_s or 0 for report in reports]),
            max(report.p99_e2e_s or 0 for report in reports),
            np.mean([report.p50_ttft_s or 0 for report in reports]),
        )
        near = sum(report.explained for report in reports)
        lines.append(
            f"| {sessions} | {name} | {rate:,.1f} | {over(rounds, baseline)} | {inside:,.1f} | "
            f"{np.mean([report.mean_batch or 0 for report in reports]):.1f} | "
            f"{read:.1f} | {cpu_ms:.2f} | {over(rounds, baseline, 'cpu_ms')} | "
            f"{' | '.join(f'{time:.2f}' for time in times)} | {max(level.kv_bytes for level in rounds) / 1e6:.2f} | "
            f"{sum(report.matched for report in reports)}/{sum(report.checked for report in reports)}"
            f"{f' +{near} near-ties' if near else ''} |"
        )
    return lines


def plot(levels: list[Level], path: Path, title: str) -> None:
    """Tokens a second over sessions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    counts = sorted({level.sessions for level in levels})
    for name in ARRANGEMENTS:
        mine = [[level.tok_s for level in levels if (level.sessions, level.arrangement) == (n, name)] for n in counts]
        axes.plot(counts, [np.mean(rates) for rates in mine], marker="o", label=name)
    axes.set(xscale="log", xlabel="sessions at once", ylabel="tokens a second", title=title)
    axes.set_xticks(counts, labels=[str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main(
    model: Annotated[str, typer.Option(help="Language model: a folder or a hub id.")] = str(DEMO / "model"),
    data: Annotated[Path, typer.Option(help="Passages, embeddings, questions.")] = DEMO,
    index: Annotated[Path | None, typer.Option(help="An index folder, instead of the passages in --data.")] = None,
    retriever: Annotated[str, typer.Option(help="How the index is searched.")] = "exact",
    dtype: Annotated[str, typer.Option(help="The model's arithmetic.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    max_batch: Annotated[int, typer.Option(min=1, help="Sessions that share a forward pass.")] = 16,
    kv_mib: Annotated[int, typer.Option(min=0, help="MiB for keys and values of all sessions; 0: the default.")] = 0,
    retriever_latency: Annotated[float, typer.Option(help="SIMULATION: seconds that a search takes.")] = 0.0,
    simulate: Annotated[bool, typer.Option("--simulate", help="SIMULATION: an engine that only sleeps.")] = False,
    sessions: Annotated[str, typer.Option(help="Sessions at once, with commas.")] = "1,4,16,64",
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each arrangement and number of sessions.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of that; 3 or more for intervals.")] = 1,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that clients choose from.")] = 16,
    prefix: Annotated[int, typer.Option(min=1, help="The model alone: tokens of a prefix.")] = 384,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that clients ask for, at most.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the clients.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write OUT.md, OUT.json and OUT.svg.")] = None,
) -> None:
    """Measure, print, and write what was measured so far after every number of sessions."""
    counts = [int(count) for count in sessions.split(",")]
    options = StressOptions(
        model="" if simulate else model,
        data=data,
        index=index,
        retriever=retriever,
        dtype=dtype,
        device=device,
        max_batch=max_batch,
        kv_mib=kv_mib,
        retriever_latency=retriever_latency,
    )
    simulated = SimulatedModel(batch=max_batch, pass_s=0.005, session_s=0.0005)
    engine = simulated_engine(options, simulated) if simulate else open_engine(options)
    traffic = Traffic(prompts=prompts, max_new_tokens=max_new_tokens, seed=seed)
    asked = mixed_prompts(engine, prompts, seed)
    oracle = anyio.run(partial(right_answers, engine, asked, max_new_tokens=max_new_tokens, sampling=Sampling()))
    console = Console(width=180)
    _forward(engine, {-1: np.arange(10, 50)})  # warm
    engine.model.forget(-1)
    phases = [phase(engine, count, prefix, max_new_tokens) for count in counts]
    levels: list[Level] = []
    for number, count in enumerate(counts):
        served = {name: make() for name, make in ARRANGEMENTS.items()}
        for turn in range(rounds):
            turns = np.random.default_rng([number, turn]).permutation([*served]).tolist()
            made = {name: serve(engine, name, served[name], count, seconds, traffic, oracle, turn) for name in turns}
            levels += [made[name] for name in served]
            for name in served:
                console.print(f"{count} sessions, {name}: {made[name].tok_s:,.1f} tok/s")
        if out is None:
            continue
        facts = environment(engine=options.facts(), retriever=engine.description, simulated=simulate, seconds=seconds)
        head = f"{'SIMULATED engine. ' if simulate else ''}{facts['retriever']}. {rounds} rounds of "
        head += f"{seconds:g} s each, at most {max_new_tokens} tokens. {facts['date']}, {facts['machine']}, "
        head += f"load average {facts['load_average']}."
        out.with_suffix(".md").write_text("\n".join([head, "", *markdown(phases, levels)]) + "\n")
        rows = [
            asdict(level) | {"made": level.made.model_dump(mode="json", exclude={"environment"})} for level in levels
        ]
        everything = {"environment": facts, "phases": [asdict(each) for each in phases], "levels": rows}
        out.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
        plot(levels, out.with_suffix(".svg"), "simulated engine" if simulate else Path(model).name)
    console.print("\n".join(markdown(phases, levels)), markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
