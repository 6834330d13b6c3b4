"""Stress runs on a simulated engine: what goes wrong on purpose is accounted for, and what may not go wrong is seen."""

import io
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import anyio
import pytest
from rich.console import Console
from rich.live import Live

from ralmspec.pipeline import (
    Arrangement,
    Asynchronous,
    Continuous,
    Done,
    Event,
    Limits,
    Sampling,
    Sequential,
    SessionStream,
    Synchronous,
    injected_faults,
)
from ralmspec.pipeline import stress as stress_module
from ralmspec.pipeline.arrivals import ClosedLoop, OpenLoop
from ralmspec.pipeline.command_stress import StressOptions
from ralmspec.pipeline.engine import Engine
from ralmspec.pipeline.simulated import SimulatedModel, simulated_engine
from ralmspec.pipeline.stress import Plan, Stress
from ralmspec.pipeline.stress_oracle import Oracle, right_answers
from ralmspec.pipeline.stress_report import StressReport, report
from ralmspec.pipeline.stress_tally import Ended, Fate
from ralmspec.pipeline.stress_view import StressView
from ralmspec.pipeline.traffic import Traffic, mixed_prompts
from ralmspec.stages.in_context import BoundInContext
from ralmspec.stages.model import Frontier, Prefix, token_by_token
from ralmspec.stages.request import Status
from ralmspec.stages.session import Session
from ralmspec.stages.sink import Sink

TOKENS, PROMPTS = 16, 6


@pytest.fixture
def anyio_backend() -> str:
    """One: a run looks at threads, and under pytest trio has some of its own; trio has a test below."""
    return "asyncio"


@pytest.fixture(autouse=True)
def late_but_not_very(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injected_faults, "LATE_S", 0.02)


def simulated(model: SimulatedModel | None = None) -> Engine:
    return simulated_engine(StressOptions(), model or SimulatedModel())


def answers() -> Oracle:
    engine = simulated()
    prompts = mixed_prompts(engine, PROMPTS, 0)
    return anyio.run(partial(right_answers, engine, prompts, max_new_tokens=TOKENS, sampling=Sampling()))


ORACLE = answers()


def prepared(
    model: SimulatedModel | None = None,
    *,
    limits: Limits | None = None,
    cancels: float = 0.0,
    slow: float = 0.0,
    told: Callable[[Ended], None] = lambda ended: None,
    tick: Callable[[Stress], None] = lambda stress: None,
    **plan: Any,
) -> Stress:
    """A run of 60 clients, 16 at a time, unless said otherwise."""
    traffic = Traffic(prompts=PROMPTS, max_new_tokens=TOKENS, cancel_rate=cancels, slow_reader_rate=slow, seed=3)
    given: dict[str, Any] = {
        "arrivals": ClosedLoop(concurrency=16),
        "arrangement": Asynchronous(),
        "sessions": 60,
        "traffic": traffic,
    }
    limits = limits or Limits(sessions=16, waiting=64, drain_s=5.0)
    return Stress(simulated(model), Plan(**given | plan), ORACLE, limits, told=told, tick=tick)


async def ran(stress: Stress) -> StressReport:
    with anyio.fail_after(60):
        await stress.run()
    made = report(stress)
    ends = made.completed + made.cancelled + sum(made.failed.values()) + made.refused + made.lost
    assert made.sessions == ends == stress.come, "every client is accounted for, once"
    assert made.checked == made.matched + made.explained + made.wrong
    return made


def nothing_wrong(made: StressReport) -> None:
    assert (made.lost, made.wrong, made.leaked, made.explained) == (0, 0, 0, 0), made.cases
    assert made.sound


@pytest.mark.parametrize(
    "arrangement",
    [Sequential(), Synchronous(speculation_stride=3), Asynchronous(), Continuous(prefetch=4)],
    ids=lambda arrangement: type(arrangement).__name__,
)
async def test_every_arrangement_serves_everybody(arrangement: Arrangement) -> None:
    made = await ran(prepared(arrangement=arrangement))
    nothing_wrong(made)
    assert (made.sessions, made.completed, made.matched) == (60, 60, 60)
    assert made.simulated and made.seconds > 0 and made.throughput_tok_s > 0
    assert made.goodput_share == 1.0 and made.goodput == pytest.approx(60 / made.seconds)
    assert made.mean_batch is not None and made.mean_batch > 2, "sessions share passes"
    assert made.kb_queries > made.kb_calls > 0
    times = (made.p50_ttft_s, made.p50_e2e_s, made.p95_e2e_s, made.p99_e2e_s)
    assert None not in times and [*times] == sorted(times, key=lambda time: time or 0)
    assert made.p99_token_s is not None and made.loop_lag_p99_s is not None
    assert (made.rollbacks > 0) == (not isinstance(arrangement, Sequential))
    assert (made.failed, made.refusals, made.injected, made.died, made.stopped) == ({}, 0, {}, None, None)


async def test_cancels_and_faults_lose_nothing() -> None:
    """5 % of clients give up, and of calls 2 % go wrong; everybody else gets what they should."""
    made = await ran(prepared(sessions=600, cancels=0.05, fault_rate=0.02))
    nothing_wrong(made)
    assert 15 <= made.cancelled <= 45
    assert made.completed > 200 and made.failed.keys() == {"ModelFailed", "RetrieverFailed"}
    assert sum(made.injected.values()) > 10
    assert {kind.split()[0] for kind in made.injected} >= {"forward", "encode", "search"}


def test_trio_and_uvloop_serve_as_well() -> None:
    pytest.importorskip("uvloop", reason="needs ralmspec[local]")
    for backend, options in (("trio", {}), ("asyncio", {"use_uvloop": True})):
        made = anyio.run(
            ran, prepared(cancels=0.1, fault_rate=0.01, slow=0.05), backend=backend, backend_options=options
        )
        nothing_wrong(made)
        assert made.completed > 20


async def test_all_ways_of_giving_up_are_cancels() -> None:
    made = await ran(prepared(SimulatedModel(pass_s=0.002), sessions=100, cancels=1.0))
    nothing_wrong(made)
    assert made.cancelled > 60 and made.cancelled + made.completed == 100, "some are too late"


async def test_slow_readers_pause_only_themselves() -> None:
    ends: list[Ended] = []
    stress = prepared(slow=0.2, told=ends.append, sessions=50, slo_e2e_s=0.15)
    made = await ran(stress)
    nothing_wrong(made)
    assert made.completed == 50 and stress.limits.unread_events == 2
    assert 0 < made.goodput_share < 1 and sum(end.kept_slo for end in ends) == round(50 * made.goodput_share)


@pytest.mark.parametrize("bursty", [False, True])
async def test_overload_refuses_and_the_refused_try_again(bursty: bool) -> None:
    arrivals = OpenLoop(phases=((math.inf, 400.0),), bursty=bursty)
    limits = Limits(sessions=4, waiting=2)
    made = await ran(prepared(SimulatedModel(pass_s=0.003), arrivals=arrivals, limits=limits, sessions=120, retries=1))
    nothing_wrong(made)
    assert made.refused > 10 and made.completed + made.refused == 120
    assert made.refusals > made.refused and made.retries == made.refusals - made.refused
    assert made.p99_refusal_s is not None and made.p99_refusal_s < 0.1


async def test_deadlines_end_what_takes_too_long() -> None:
    made = await ran(prepared(SimulatedModel(pass_s=0.005), deadline_s=0.06))
    nothing_wrong(made)
    assert made.failed.keys() == {"DeadlineExceeded"} and made.goodput_share < 1


async def test_seconds_end_the_arrivals() -> None:
    stress = prepared(sessions=math.inf, seconds=0.3)
    made = await ran(stress)
    nothing_wrong(made)
    assert made.completed == made.sessions > 16 and made.seconds >= 0.3


async def test_leaving_a_loaded_pipeline_ends_everybody() -> None:
    model, limits = SimulatedModel(pass_s=0.02), Limits(sessions=8, waiting=8, drain_s=0.1)
    made = await ran(prepared(model, limits=limits, sessions=math.inf, drain_after_s=0.2))
    nothing_wrong(made)
    assert made.failed.keys() == {"NotServing"} and made.seconds < 5


async def test_a_drain_lets_live_sessions_end() -> None:
    made = await ran(prepared(SimulatedModel(pass_s=0.002), sessions=math.inf, drain_after_s=0.2))
    nothing_wrong(made)
    assert made.completed >= 16 and sum(made.failed.values()) <= 8, "only those who waited for a slot are turned away"


async def test_a_dead_stage_is_told_to_everybody() -> None:
    made = await ran(prepared(SimulatedModel(pass_s=0.005), sessions=math.inf, kill_after_s=0.2))
    nothing_wrong(made)
    assert made.failed.keys() == {"EngineDead"} and 8 <= made.failed["EngineDead"] <= 16
    assert made.died is not None and "killed on purpose" in made.died
    assert made.death_to_last_error_s is not None and made.death_to_last_error_s < 1


async def test_stopping_drains_and_stopping_twice_ends() -> None:
    def once(stress: Stress) -> None:
        if stress.tally.ended > 20 and stress.stopped is None:
            stress.stop(signal.SIGINT)

    made = await ran(prepared(SimulatedModel(pass_s=0.002), sessions=math.inf, tick=once))
    nothing_wrong(made)
    assert made.stopped == "SIGINT" and made.sessions >= 36 and made.completed >= 36 - 8

    def twice(stress: Stress) -> None:
        if stress.model.passes:
            stress.stop(signal.SIGTERM)
            stress.stop(signal.SIGTERM)

    made = await ran(prepared(SimulatedModel(pass_s=0.3), tick=twice))
    nothing_wrong(made)
    assert made.stopped == "SIGTERM" and made.failed == {"NotServing": 16} and made.seconds < 5


async def test_the_view_shows_what_is_going_on() -> None:
    shown = io.StringIO()
    with Live(console=Console(file=shown, force_terminal=True, width=120), auto_refresh=False) as live:
        await ran(prepared(SimulatedModel(pass_s=0.002), fault_rate=0.05, tick=StressView(live).tick, sessions=300))
    said = shown.getvalue()
    assert "simulated" in said
    for name in ("live", "waiting", "done", "cancelled", "failed", "Failed", "lost", "tok/s", "p99", "loop lag"):
        assert name in said


async def test_what_others_do_meanwhile_ends_with_the_run() -> None:
    cancelled = False

    async def other() -> None:
        nonlocal cancelled
        try:
            await anyio.sleep_forever()
        finally:
            cancelled = True

    await prepared(sessions=3).run(other)
    assert cancelled


# What must be seen ---------------------------------------------------------------------------------------------------


class Lies(SimulatedModel):
    """Now and then another token than it should be."""

    passes = 0

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        self.passes += 1
        outcomes = super().forward(prefixes)
        lie = token_by_token(prefixes[0], lambda tokens: self._frontiers[7])
        return [lie, *outcomes[1:]] if self.passes % 20 == 0 else outcomes


async def test_a_model_that_lies_is_found_out() -> None:
    made = await ran(prepared(Lies()))
    assert made.wrong > 0 and made.matched < made.checked == 60
    assert (made.lost, made.leaked) == (0, 0) and not made.sound
    assert made.cases and all("wrong at token" in case and "gap 1.0" in case for case in made.cases)


async def test_a_pipeline_that_commits_wrong_guesses_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundInContext, "agree", lambda *_: True)
    made = await ran(prepared())
    assert made.wrong > 0 and not made.sound


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stress_module, "PATIENCE_S", 0.5)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("arrivals", [ClosedLoop(concurrency=8), OpenLoop(phases=((math.inf, 200.0),))])
async def test_a_session_that_never_ends_is_lost(monkeypatch: pytest.MonkeyPatch, arrivals: Any) -> None:
    put = Sink.put

    def forgetful(self: Sink, event: Event) -> None:
        if not (isinstance(event, Done) and self.session.id % 20 == 0):
            put(self, event)

    monkeypatch.setattr(Sink, "put", forgetful)
    made = await ran(prepared(arrivals=arrivals))
    assert 1 <= made.lost <= 4 and not made.sound
    assert made.cases == [f"lost ({made.lost}): no end"]
    assert made.wrong == 0


async def test_an_error_that_is_none_of_ours_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Session.finish

    def bare(self: Session, status: Status, error: BaseException | None = None) -> None:
        finish(self, status, LookupError("bare") if status is Status.FAILED else error)

    monkeypatch.setattr(Session, "finish", bare)
    made = await ran(prepared(fault_rate=0.1))  # often enough that some call for one session alone fails
    assert made.lost > 0 and made.failed == {} and not made.sound
    assert made.cases == [f"lost ({made.lost}): LookupError: bare"]


async def test_a_stream_that_stops_without_an_end_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    following = SessionStream.__anext__

    async def stops(self: SessionStream) -> Event:
        event = await following(self)
        if isinstance(event, Done):
            raise StopAsyncIteration
        return event

    monkeypatch.setattr(SessionStream, "__anext__", stops)
    made = await ran(prepared(sessions=5))
    assert made.cases == ["lost (5): the stream stopped without Done"]


class Leaks(SimulatedModel):
    """Leaves a thread and a descriptor behind, and says that it still holds a session."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()
        self.threads: list[threading.Thread] = []
        self.descriptors: list[int] = []

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        if not self.threads:
            self.threads.append(threading.Thread(target=self.release.wait))
            self.threads[0].start()
            self.descriptors.append(os.open(os.curdir, os.O_RDONLY))
        return super().forward(prefixes)

    def held_sessions(self) -> int:
        return len(self.threads)

    def clean(self) -> None:
        self.release.set()
        self.threads[0].join()
        os.close(self.descriptors[0])


@pytest.fixture
def leaky() -> Iterator[Leaks]:
    model = Leaks()
    yield model
    model.clean()


async def test_leaks_are_found_by_kind(leaky: Leaks) -> None:
    made = await ran(prepared(leaky, sessions=5))
    assert (made.leaked_threads, made.leaked_descriptors, made.leaked_sessions, made.leaked_tasks) == (1, 1, 1, 0)
    assert made.leaked == 3 and not made.sound and made.lost == made.wrong == 0


async def test_ends_are_told_as_they_come() -> None:
    ends: list[Ended] = []
    await prepared(sessions=10, told=ends.append).run()
    assert [end.fate for end in ends] == [Fate.COMPLETED] * 10
    assert all(end.ttft_s is not None and 0 < end.ttft_s <= end.e2e_s for end in ends)
