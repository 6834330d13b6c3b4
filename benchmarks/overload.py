"""Five times more clients than can be served, for a minute: what is still good, how fast refusals are, and what is
left of it afterwards.

    python benchmarks/overload.py
    python benchmarks/overload.py --slots 16 --patience 1
    python benchmarks/overload.py --model FOLDER --data FOLDER --seconds 60 --calm 60 --out overload

A closed loop with every slot taken gives the peak rate, and the service level: good is what comes within three times of
what 99 of 100 sessions took there, to the first token and to the end. Nobody waits for a slot there; from then on the
wait counts. Clients come by the clock, whether or not they can be served: at 0.7 of the peak rate, at five times of it,
and at 0.7 again; without retries.

Needs ralmspec[demo], or --simulate, and ralmspec[bench] for the plot of --out.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import anyio
import numpy as np
import typer
from rich.console import Console

from ralmspec.pipeline import Asynchronous, Sampling
from ralmspec.pipeline.arrivals import ClosedLoop, OpenLoop
from ralmspec.pipeline.command_stress import StressOptions
from ralmspec.pipeline.engine import open_engine
from ralmspec.pipeline.simulated import SimulatedModel, simulated_engine
from ralmspec.pipeline.stress import Plan, Stress
from ralmspec.pipeline.stress_oracle import right_answers
from ralmspec.pipeline.stress_report import StressReport, report
from ralmspec.pipeline.stress_tally import Ended, Fate
from ralmspec.pipeline.traffic import Traffic, mixed_prompts

DEMO = Path(__file__).parent.parent / "examples" / "demo"
NORMAL, SURGE, SLACK = 0.7, 5.0, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Overload:
    """Sessions a second; good ones by the second in which they ended. `share` is the surge's goodput over the peak."""

    peak: float
    before: float
    surge: float
    after: float
    share: float
    recovery_s: float | None
    """From the end of the surge to the end of the first second whose clients were all served, half of them as fast as
    95 of 100 were before it; None if there is none."""
    good_each_second: list[int]
    made: StressReport


def measured(ends: Sequence[Ended], peak: float, calm: float, seconds: float, made: StressReport) -> Overload:
    """What the ends of all clients say; their `arrived` counts from the beginning of the run."""
    surge_ends, over = calm + seconds, calm + seconds + calm
    good = np.array([end.arrived + end.e2e_s for end in ends if end.kept_slo])

    def rate(a: float, b: float) -> float:
        return float(((good >= a) & (good < b)).sum() / (b - a))

    return Overload(
        peak=peak,
        before=rate(0, calm),
        surge=rate(calm, surge_ends),
        after=rate(surge_ends, over),
        share=rate(calm, surge_ends) / peak,
        recovery_s=_recovery(ends, calm, surge_ends, over),
        good_each_second=[int(((good >= n) & (good < n + 1)).sum()) for n in range(math.ceil(over))],
        made=made,
    )


def _recovery(ends: Sequence[Ended], calm: float, surge_ends: float, over: float) -> float | None:
    def came(a: float, b: float) -> list[Ended]:
        return [end for end in ends if a <= end.arrived < b]

    before = [end.e2e_s for end in came(0, calm) if end.fate is Fate.COMPLETED]
    usual = float(np.quantile(before, 0.95)) if before else 0.0
    for second in range(math.ceil(over - surge_ends)):
        here = came(surge_ends + second, surge_ends + second + 1)
        served = [end.e2e_s for end in here if end.fate is Fate.COMPLETED]
        if here and len(served) == len(here) and float(np.median(served)) <= usual:
            return second + 1.0
    return None


def in_words(found: Overload) -> str:
    """All of it in a few lines."""
    made = found.made
    recovered = "did not recover" if found.recovery_s is None else f"recovered within {found.recovery_s:.0f} s"
    refusal, lag = ((time or 0.0) * 1e3 for time in (made.p99_refusal_s, made.loop_lag_p99_s))
    return "\n".join(
        (
            f"peak {found.peak:.2f} sessions/s; good: first token in {made.slo.ttft_s:.2f} s, end in "
            f"{made.slo.e2e_s:.2f} s",
            f"goodput {found.before:.2f} before the surge, {found.surge:.2f} in it ({found.share:.0%} of the peak), "
            f"{found.after:.2f} after it; {recovered}",
            f"{made.refused:,} of {made.sessions:,} clients refused, p99 of a refusal {refusal:.2f} ms; loop lag p99 "
            f"{lag:.1f} ms",
            f"lost {made.lost}, wrong {made.wrong}, leaked {made.leaked}",
        )
    )


def plot(found: Overload, path: Path, title: str) -> None:
    """Good sessions over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(found.good_each_second)
    axes.axhline(found.peak, color="grey", linewidth=0.8, label="peak")
    axes.set(xlabel="seconds", ylabel="good sessions a second", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main(
    model: Annotated[str, typer.Option(help="Language model: a folder or a hub id.")] = str(DEMO / "model"),
    data: Annotated[Path, typer.Option(help="Passages, embeddings, questions.")] = DEMO,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    max_batch: Annotated[int, typer.Option(min=1, help="Sessions that share a forward pass.")] = 16,
    retriever_latency: Annotated[float, typer.Option(help="SIMULATION: seconds that a search takes.")] = 0.0,
    simulate: Annotated[bool, typer.Option("--simulate", help="SIMULATION: an engine that only sleeps.")] = False,
    slots: Annotated[int, typer.Option(min=1, help="Sessions live at once.")] = 64,
    waiting: Annotated[int, typer.Option(min=0, help="Clients in the waiting room.")] = 64,
    patience: Annotated[float, typer.Option(min=0.01, help="Seconds that they may be expected to wait.")] = math.inf,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time of the surge.")] = 60.0,
    calm: Annotated[float, typer.Option(min=0.1, help="Time for the peak, before the surge, and after it.")] = 20.0,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that clients choose from.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that clients ask for, at most.")] = 32,
    seed: Annotated[int, typer.Option(help="Of clients and arrivals.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write OUT.md, OUT.json and OUT.svg.")] = None,
) -> None:
    """Measure, print, and write."""
    options = StressOptions(
        model="" if simulate else model,
        data=data,
        device=device,
        max_batch=max_batch,
        retriever_latency=retriever_latency,
    )
    simulated = SimulatedModel(batch=max_batch, pass_s=0.005, session_s=0.0005)
    engine = simulated_engine(options, simulated) if simulate else open_engine(options)
    limits = replace(engine.limits, sessions=slots, waiting=waiting, patience_s=patience)
    asked = mixed_prompts(engine, prompts, seed)
    oracle = anyio.run(partial(right_answers, engine, asked, max_new_tokens=max_new_tokens, sampling=Sampling()))

    def run(plan: Plan) -> tuple[StressReport, list[Ended]]:
        ends: list[Ended] = []
        stress = Stress(engine, plan, oracle, limits, told=ends.append)
        anyio.run(stress.run, backend_options={"use_uvloop": True})
        return report(stress), [replace(end, arrived=end.arrived - stress.began) for end in ends]

    closed = Plan(
        arrivals=ClosedLoop(concurrency=slots),
        traffic=Traffic(prompts=prompts, max_new_tokens=max_new_tokens, seed=seed),
        arrangement=Asynchronous(),
        seconds=calm,
    )
    best, ends = run(closed)
    late = [calm / 4 <= end.arrived + end.e2e_s < calm for end in ends if end.fate is Fate.COMPLETED]
    peak = sum(late) / (0.75 * calm)  # without the beginning, when nothing ends yet
    phases = ((calm, NORMAL * peak), (seconds, SURGE * peak), (calm, NORMAL * peak))
    loaded = replace(
        closed,
        arrivals=OpenLoop(phases=phases),
        seconds=math.inf,
        slo_ttft_s=SLACK * (best.p99_ttft_s or 1.0),
        slo_e2e_s=SLACK * (best.p99_e2e_s or 1.0),
    )
    made, ends = run(loaded)
    found = measured(ends, peak, calm, seconds, made)
    said = ("SIMULATED engine\n" if simulate else "") + in_words(found)
    Console(width=150).print(said, markup=False, highlight=False)
    if out is not None:
        facts = made.environment
        room = f"{slots} slots, {waiting} may wait" + ("" if math.isinf(patience) else f", for {patience:g} s at most")
        head = f"{facts['retriever']}; {room}. {facts['date']}, {facts['machine']}."
        out.with_suffix(".md").write_text(f"{head}\n\n{said}\n")
        everything = asdict(found) | {"made": made.model_dump(mode="json")}
        out.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
        plot(found, out.with_suffix(".svg"), f"a surge of {SURGE:g} times the peak for {seconds:g} s")


if __name__ == "__main__":
    typer.run(main)
