"""`ralmspec stress`: many sessions at once, faults on purpose, and an account of all of them."""

import logging
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import anyio
import typer
from rich.markup import escape

from ralmspec.stages.sampling import Sampling

from . import terminal
from .adaptive import Adaptive
from .arrangements import Asynchronous, Continuous, Sequential, Synchronous
from .arrivals import ClosedLoop, OpenLoop
from .engine import EngineOptions
from .limits import Limits
from .options import JsonOption, NewTokensOption, TemperatureOption, with_options
from .simulated import SimulatedModel, simulated_engine
from .speculation import Speculation
from .stress import STALL_S, Plan, Stress
from .stress_oracle import right_answers
from .stress_report import report
from .stress_view import summary, watching
from .terminal import ends_in_a_sentence, err, load, out, run
from .traffic import Traffic, mixed_prompts

Arranged = Literal["sequential", "synchronous", "asynchronous", "continuous", "adaptive"]
_SESSIONS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class StressOptions(EngineOptions):
    """An engine from paths, or, without a model, a simulated one."""

    model: str = ""


@with_options(StressOptions)
def stress_command(
    engine_options: StressOptions,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="SIMULATION: no model and no data; answers are drawn, latencies slept.")
    ] = False,
    model_latency: Annotated[float, typer.Option(min=0.0, help="SIMULATION: seconds a forward pass.")] = 0.002,
    token_latency: Annotated[
        float, typer.Option(min=0.0, help="SIMULATION: seconds more for every session in a pass beyond the first.")
    ] = 0.0001,
    query_latency: Annotated[
        float, typer.Option(min=0.0, help="SIMULATION: seconds a query, beside --retriever-latency a search.")
    ] = 0.0,
    sessions: Annotated[
        int | None, typer.Option(min=1, help=f"Clients in all; {_SESSIONS:,} if --seconds is not given either.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="No client comes after so long.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.0, help="Open loop: clients a second, come what may.")] = None,
    arrivals: Annotated[
        Literal["poisson", "bursty"], typer.Option(help="Open loop: gaps exponential, or four times as irregular.")
    ] = "poisson",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: clients at a time; as many as slots if nothing is given.")
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="Prompts that clients choose from: questions, passages, and four passages long.")
    ] = 16,
    max_new_tokens: NewTokensOption = 32,
    cancel_rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of clients that give up.")] = 0.0,
    slow_reader_rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of clients that read slowly.")] = 0.0,
    fault_rate: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of calls into model and retriever that raise, come late, or bring NaN or the wrong shape.",
        ),
    ] = 0.0,
    deadline: Annotated[float | None, typer.Option(min=0.0, help="Seconds that a session may take.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a refused client tries again, as it is told.")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="Sessions live at once.")] = Limits().sessions,
    waiting: Annotated[int, typer.Option(min=0, help="Clients in the waiting room.")] = Limits().waiting,
    arrangement: Annotated[Arranged, typer.Option(help="How it is served.")] = "asynchronous",
    stride: Annotated[str, typer.Option(help="Speculation stride: a number, or 'os3' for the scheduler.")] = "os3",
    prefetch: Annotated[int, typer.Option(min=1, help="Documents that every search brings.")] = 20,
    drain_after: Annotated[
        float | None, typer.Option(min=0.0, help="Leave the pipeline after so many seconds, loaded as it is.")
    ] = None,
    drain_within: Annotated[
        float, typer.Option(min=0.0, help="Seconds that live sessions get to end when the pipeline is left.")
    ] = Limits().drain_s,
    kill_stage_after: Annotated[
        float | None, typer.Option(min=0.0, help="A stage dies after so many seconds; every client must be told.")
    ] = None,
    slo_ttft: Annotated[float, typer.Option(min=0.0, help="First tokens within so many seconds are good.")] = 1.0,
    slo_e2e: Annotated[float, typer.Option(min=0.0, help="Ends within so many seconds are good.")] = 10.0,
    temperature: TemperatureOption = 0.0,
    seed: Annotated[int, typer.Option(help="Of clients, arrivals, faults and sampling.")] = 0,
    json: JsonOption = None,
) -> None:
    """Serve many sessions at once, let things go wrong, and account for every session.

    Every output, and the committed beginning of every other, is compared with RaLMSeq's answer, worked out before.
    Clients ask for a quarter, a half or all of --max-new-tokens. The command fails if a session was lost, an output was
    wrong and no near-tie explains it, something leaked, or the engine died without --kill-stage-after. Ctrl-C and
    SIGTERM drain, and what was measured is reported; twice ends live sessions too.
    """
    if simulate == bool(engine_options.model):
        raise typer.BadParameter("give either --model, with --data or --index, or --simulate")
    if rate is not None and concurrency is not None:
        raise typer.BadParameter("--rate is an open loop, --concurrency a closed one: give one of them")
    with ends_in_a_sentence():
        plan = Plan(
            arrivals=ClosedLoop(concurrency=concurrency or slots)
            if rate is None
            else OpenLoop(phases=((math.inf, rate),), bursty=arrivals == "bursty"),
            traffic=Traffic(
                prompts=prompts,
                max_new_tokens=max_new_tokens,
                cancel_rate=cancel_rate,
                slow_reader_rate=slow_reader_rate,
                seed=seed,
            ),
            arrangement=_arranged(arrangement, stride, prefetch),
            sessions=sessions or (_SESSIONS if seconds is None else math.inf),
            seconds=math.inf if seconds is None else seconds,
            retries=retries,
            deadline_s=math.inf if deadline is None else deadline,
            fault_rate=fault_rate,
            drain_after_s=math.inf if drain_after is None else drain_after,
            kill_after_s=math.inf if kill_stage_after is None else kill_stage_after,
            slo_ttft_s=slo_ttft,
            slo_e2e_s=slo_e2e,
        )
        sampling = Sampling(temperature=temperature, seed=seed)
    opened: list[Stress] = []

    async def main() -> None:
        if simulate:
            model = SimulatedModel(batch=engine_options.max_batch, pass_s=model_latency, session_s=token_latency)
            engine = simulated_engine(engine_options, model, query_s=query_latency)
        else:
            engine = load(engine_options)
        limits = replace(engine.limits, sessions=slots, waiting=waiting, drain_s=drain_within, stall_s=STALL_S)
        asked = mixed_prompts(engine, prompts, seed)
        with terminal.progress("answering alone", prompts) as tell:
            oracle = await right_answers(engine, asked, max_new_tokens=max_new_tokens, sampling=sampling, progress=tell)
        with watching() as view:
            opened.append(Stress(engine, plan, oracle, limits, tick=view.tick))
            await opened[0].run(partial(_listen, opened[0]))

    try:
        with _without_warnings():
            run(main)
    finally:
        if opened and opened[0].seconds:
            _told(opened[0], json)
    if (stopped := opened[0].stopped) is not None:
        raise typer.Exit(128 + stopped)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Faults made on purpose are counted; a line for each would bury the rest."""
    log = logging.getLogger("ralmspec.stages")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


async def _listen(stress: Stress) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            err.print("draining; once more to end live sessions too" if stress.stopped is None else "ending")
            stress.stop(number)


def _arranged(arrangement: Arranged, stride: str, prefetch: int) -> Speculation:
    match arrangement:
        case "adaptive":
            return Adaptive(prefetch=prefetch)
        case "sequential":
            return Sequential()
        case "continuous":
            return Continuous(prefetch=prefetch)
        case "synchronous" | "asynchronous":
            kind = Asynchronous if arrangement == "asynchronous" else Synchronous
            return kind(speculation_stride=terminal.stride(stride), prefetch=prefetch)


def _told(stress: Stress, json: Path | None) -> None:
    """Show and write what was measured; exit with an error where that is not sound."""
    with err.status("comparing what differs"):
        made = report(stress)
    out.print(summary(made))
    for case in made.cases:
        out.print(f"[red]{escape(case)}[/red]", highlight=False)
    if json:
        json.write_text(made.model_dump_json(indent=2) + "\n")
    if not made.sound or (made.died is not None and math.isinf(stress.plan.kill_after_s)):
        raise typer.Exit(1)
