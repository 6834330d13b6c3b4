"""Serves many sessions of an engine, with whatever goes wrong on purpose, and keeps account of all of them."""

import math
import random
from array import array
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import anyio
from anyio.abc import TaskGroup

from .arrivals import ClosedLoop, OpenLoop
from .engine import Engine
from .errors import EngineDead
from .injected_faults import Faults, FaultyModel, FaultyRetriever, MortalWorker
from .leaks import Footprint, left_behind, resident_bytes
from .limits import Limits
from .metered import MeteredModel, MeteredRetriever
from .pipeline import Pipeline
from .simulated import SimulatedModel
from .speculation import Speculation
from .stress_client import Client
from .stress_oracle import Oracle
from .stress_tally import Ended, Tally
from .traffic import Traffic, Visit

TICK_S = 0.5
NAP_S = 0.02
STALL_S = 60.0
"""A session that could act and does not for so long is failed by the pipeline's own watchdog."""
PATIENCE_S = 150.0
"""Without a sign of life from any session for so long, those that are left are lost."""
_SLOW_READERS_UNREAD = 2
"""Events that may wait for a reader where some are slow: answers are short, and some sessions should have to pause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run does to a pipeline. Times in seconds; `sessions` and `seconds` end the arrivals, the first of them.

    `drain_after_s`: leave the pipeline while it is loaded. `kill_after_s`: a thread is lost, and a stage dies of it.
    """

    arrivals: OpenLoop | ClosedLoop
    traffic: Traffic
    arrangement: Speculation
    sessions: float = math.inf
    seconds: float = math.inf
    retries: int = 0
    deadline_s: float = math.inf
    fault_rate: float = 0.0
    drain_after_s: float = math.inf
    kill_after_s: float = math.inf
    slo_ttft_s: float = 1.0
    slo_e2e_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("sessions", "seconds", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")


class Stress:
    """One run; `run` it once. What was counted so far can be read at any time, and stays when the run is cut short."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        oracle: Oracle,
        limits: Limits,
        *,
        told: Callable[[Ended], None] = lambda ended: None,
        tick: Callable[["Stress"], None] = lambda stress: None,
    ) -> None:
        if plan.traffic.slow_reader_rate:
            limits = replace(limits, unread_events=_SLOW_READERS_UNREAD)
        self.engine, self.plan, self.oracle, self.limits = engine, plan, oracle, limits
        self.tally = Tally(slo_ttft_s=plan.slo_ttft_s, slo_e2e_s=plan.slo_e2e_s, told=told)
        self.faults = Faults(plan.fault_rate, plan.traffic.seed)
        self.model = MeteredModel(FaultyModel(engine.model, self.faults))
        self.retriever = MeteredRetriever(FaultyRetriever(engine.retriever, self.faults))
        self.workers: list[MortalWorker] = []
        model: Any = self.model
        retriever: Any = self.retriever
        self.pipeline = Pipeline(
            model=model,
            retriever=retriever,
            workload=engine.workload,
            speculation=plan.arrangement,
            limits=limits,
            worker=None if plan.kill_after_s == math.inf else self._mortal,
        )
        self.simulated = isinstance(engine.model, SimulatedModel)
        self.began = self.seconds = 0.0
        """Begun when, by `perf_counter`; how many seconds it took."""
        self.died = ""
        """What the engine died of."""
        self.killed_at = math.inf
        self.stopped: int | None = None
        """The signal that cut the run short."""
        self.left = Footprint()
        self.left_sessions = 0
        self.memory = array("q"), array("q")
        """Sessions ended, and bytes resident then, twice a second; small, since it is the growth that matters."""
        self.come = 0
        self._attending = 0
        self._failure: Exception | None = None
        self._closed = False
        self._chance = random.Random(f"{plan.traffic.seed} run")
        self._tick = tick

    async def run(self, *others: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Serve until the plan is done and every client has gone; what `others` do meanwhile is then cancelled."""
        self._loading, self._serving, self._gone = anyio.CancelScope(), anyio.CancelScope(), anyio.Event()
        before, held = Footprint.now(), self._held()
        self.began, self._loop_began = perf_counter(), anyio.current_time()
        async with anyio.create_task_group() as beside:
            for work in (self._nap, self._look, self._kill, *others):
                beside.start_soon(work)
            try:
                await self._serve()
            finally:
                self.seconds = perf_counter() - self.began
                beside.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure
        self.left = await left_behind(before)
        self.left_sessions = self.pipeline.live_sessions + self.pipeline.waiting_sessions + max(0, self._held() - held)

    def stop(self, signal: int) -> None:
        """End early: drain, so that what is live may end; a second time, end that too."""
        if self.stopped is not None:
            self._serving.cancel()
        self.stopped = signal
        self._loading.cancel()

    # Load ----------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Clients outlive the pipeline: what they see when it is left, or dies, is part of the test."""
        plan = self.plan
        async with anyio.create_task_group() as clients:
            client = Client(
                self.pipeline, self.oracle, self.tally, clients, plan.retries, plan.deadline_s, self._chance
            )
            try:
                with self._serving:
                    async with self.pipeline:
                        self._loading.deadline = self._loop_began + plan.drain_after_s
                        with self._loading:
                            with anyio.move_on_after(plan.seconds):
                                await self._arrive(client, clients)
                            self._closed = True
                            await self._until(lambda: not self._attending, clients)
                        self._closed = True
            except EngineDead as death:
                self.died = str(death)
            except Exception as error:  # a task group would hide it in an exception group
                self._failure = error
            self._closed = True
            await self._until(lambda: not self._attending, clients)
            clients.cancel_scope.cancel()

    async def _arrive(self, client: Client, clients: TaskGroup) -> None:
        match self.plan.arrivals:
            case ClosedLoop(concurrency=concurrency):
                for _ in range(concurrency):
                    clients.start_soon(self._one_after_another, client)
                await self._until(lambda: self._closed, clients)
            case OpenLoop() as arrivals:
                for instant in arrivals.instants(self.plan.traffic.seed):
                    await anyio.sleep_until(self._loop_began + instant)
                    if (visit := self._next()) is None:
                        return
                    clients.start_soon(self._attend, client, visit)

    async def _one_after_another(self, client: Client) -> None:
        while (visit := self._next()) is not None:
            pause = await self._attend(client, visit)
            await anyio.sleep(pause)

    def _next(self) -> Visit | None:
        """The next client, who counts from now on as being here; None when no more should come."""
        self._closed = self._closed or self.come >= self.plan.sessions or not self.pipeline.ready
        if self._closed:
            self._wake()
            return None
        self.come += 1
        self._attending += 1
        return self.plan.traffic.visit(self.come - 1)

    async def _attend(self, client: Client, visit: Visit) -> float:
        try:
            return await client.attend(visit)
        finally:
            self._attending -= 1
            self._wake()

    def _wake(self) -> None:
        self._gone.set()
        self._gone = anyio.Event()

    async def _until(self, over: Callable[[], bool], clients: TaskGroup) -> None:
        """Wait for clients to go; those for whom nothing happens any more are cancelled, and so counted as lost."""
        while not over():
            progress = self._progress()
            with anyio.move_on_after(PATIENCE_S):
                await self._gone.wait()
                continue
            if progress == self._progress():
                self._closed = True
                clients.cancel_scope.cancel()
                return

    def _progress(self) -> tuple[int, ...]:
        return self.tally.ended, self.tally.refusals, self.model.frontiers, self.retriever.calls

    # Beside it -----------------------------------------------------------------------------------------------------

    async def _nap(self) -> None:
        """How late the loop wakes those who sleep."""
        while True:
            lay_down = perf_counter()
            await anyio.sleep(NAP_S)
            self.tally.lag.add(max(0.0, perf_counter() - lay_down - NAP_S))

    async def _look(self) -> None:
        while True:
            for column, value in zip(self.memory, (self.tally.ended, resident_bytes()), strict=True):
                column.append(value)
            self._tick(self)
            await anyio.sleep(TICK_S)

    async def _kill(self) -> None:
        """The thread of a stage that every session needs is lost."""
        if math.isinf(self.plan.kill_after_s):
            return
        await anyio.sleep(self.plan.kill_after_s)
        self.killed_at = perf_counter()
        self._chance.choice([worker for worker in self.workers if worker.name != "prefetch"]).killed = True

    def _held(self) -> int:
        """Sessions that the model keeps something for, where it can tell."""
        held: Callable[[], int] = getattr(self.engine.model, "held_sessions", lambda: 0)
        return held()

    def _mortal(self, name: str, threads: int) -> MortalWorker:
        self.workers.append(MortalWorker(name, threads))
        return self.workers[-1]
