"""Runs the stages: queues, the only task group, sessions' beginnings and ends, death, and draining."""

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import anyio
from anyio import create_memory_object_stream
from anyio.streams.memory import MemoryObjectSendStream

from ralmspec.retrievers.base import Drafter, Retriever
from ralmspec.retrievers.cache import SessionCache
from ralmspec.stages.arrangement import Arrangement
from ralmspec.stages.errors import InvariantBroken, WorkerLost
from ralmspec.stages.generate import Generate
from ralmspec.stages.load import Load
from ralmspec.stages.lookup import Lookup
from ralmspec.stages.messages import Event, Place, Turn
from ralmspec.stages.model import LanguageModel
from ralmspec.stages.prefetch import Prefetch
from ralmspec.stages.request import Request, Status
from ralmspec.stages.session import Session
from ralmspec.stages.sink import Sink
from ralmspec.stages.stage import Stage, Worker
from ralmspec.stages.statistics import Statistics
from ralmspec.stages.switch import Switch
from ralmspec.stages.verify import Verify
from ralmspec.stages.workload import BoundWorkload

from .admission import Admission
from .errors import DeadlineExceeded, EngineDead, NotServing, Stalled
from .lag_alarm import LagAlarm
from .limits import Limits
from .output_path import Delivery, PickUp
from .speculation import Chooser
from .threads import ThreadWorker
from .watchdog import OnTime, Watchdog

_SESSION_IDS: Iterator[int] = count(1)
"""Never used again, also not by another pipeline that shares the model and its KV memory (R4)."""


class Runner:
    """Everything of a pipeline that lives while it is open."""

    def __init__(
        self,
        *,
        model: LanguageModel,
        retriever: Retriever,
        drafter: Drafter | None,
        workload: BoundWorkload,
        chooser: Chooser,
        output: Sequence[Stage[Event, Event]],
        limits: Limits,
        worker: Callable[[str, int], Worker],
    ) -> None:
        self.limits = limits
        self.dead: EngineDead | None = None
        self._model = model
        self._retriever = retriever
        self._workload = workload
        self._chooser = chooser
        self._load = Load()
        self._opened = self._accepting = False
        self._changed = anyio.Event()
        self._scopes: list[anyio.CancelScope] = []

        inboxes, outboxes = {}, {}
        for place in (Place.LOOKUP, Place.GENERATE, Place.VERIFY, Place.PREFETCH):
            turns = limits.sessions * (chooser.flights if place is Place.VERIFY else 1)  # R7
            outboxes[place], inboxes[place] = create_memory_object_stream[Turn](turns)
        # A session may have so much unread, and what is in flight can still add a commit and a retraction a step.
        events = limits.sessions * (limits.unread_events + 2 * chooser.window + 2)
        path = [create_memory_object_stream[Event](events) for _ in range(len(output) + 1 if output else 0)]
        self.switch = Switch(
            outboxes, output=path[0][0] if path else None, now=anyio.current_time, released=self._released
        )
        self._sources: list[MemoryObjectSendStream[Any]] = [*outboxes.values(), *(ends[0] for ends in path[:1])]
        self.admission = Admission(
            limits,
            kv_tokens=model.kv_tokens,
            room=workload.room(),
            live=self.switch.live,
            refuse_if_closed=self._refuse_if_closed,
        )

        searches = max(1, retriever.concurrency)
        threads = {"model": 1, "encoder": 1, "index": searches, "prefetch": 1}
        self._workers = {name: worker(name, number) for name, number in threads.items()}
        live, now, workers = OnTime(self.switch.live, self._fail), anyio.current_time, self._workers
        cycle: dict[Place, Stage[Turn, Session]] = {
            Place.LOOKUP: Lookup(live, retriever, workload, workers["encoder"], now, drafter=drafter),
            Place.GENERATE: Generate(live, model, workload, workers["model"], now, load=self._load),
            Place.VERIFY: Verify(live, retriever, workload, workers["index"], now),
            Place.PREFETCH: Prefetch(live, retriever, workers["prefetch"], now),
        }
        self._stages: list[tuple[str, Stage[Any, Any], Any, Any]] = []
        for place, stage in cycle.items():
            for _ in range(searches if place is Place.VERIFY else 1):
                self._stages.append((place.value, stage, inboxes[place].clone(), self.switch))
            inboxes[place].close()
        for number, output_stage in enumerate(output):
            inbox = PickUp(path[number][1], self.switch) if number == 0 else path[number][1]
            self._stages.append((type(output_stage).__name__, output_stage, inbox, path[number + 1][0]))
        if output:
            self._stages.append(("delivery", Delivery(self.switch), path[-1][1], self.switch))
        self._running = len(self._stages)

    @property
    def accepting(self) -> bool:
        """Readiness: whether new sessions are served."""
        return self._accepting and self.dead is None

    # Beginnings and ends -------------------------------------------------------------------------------------------

    async def admit(self, request: Request) -> Sink:
        """Begin a session when its turn has come. Raises what `Admission.let_in` does."""
        return await self.admission.let_in(request, lambda: self._begin(request))

    def _begin(self, request: Request) -> Sink:
        def reconsider(arrangement: Arrangement, taken: Statistics) -> Arrangement:
            self._chooser.learn(request, arrangement, taken)
            return self._chooser.choose(request)

        session = Session(
            next(_SESSION_IDS),
            request,
            workload=self._workload,
            arrangement=self._chooser.choose(request),
            reconsider=reconsider,
            window=self._chooser.window,
            load=self._load,
            cache=SessionCache(self._retriever, self.limits.cached_documents),
            render=self._model.decode,
            emit=self.switch.emit,
            now=anyio.current_time,
        )
        sink = self.switch.register(session)
        self._change()
        return sink

    def _refuse_if_closed(self) -> None:
        if self.dead is not None:
            raise EngineDead(str(self.dead)) from self.dead
        if not self._opened:
            raise NotServing("the pipeline is not open: enter it with `async with`, and open sessions inside")
        if not self._accepting:
            raise NotServing("the pipeline is closing, or closed: it takes no new sessions")

    def end(self, session: Session, status: Status, error: BaseException) -> None:
        """Finish a session from outside the stages, and let go of what is not out."""
        session.finish(status, error)
        self.switch.send_nowait(session)

    def _fail(self, session: Session, error: BaseException) -> None:
        self.end(session, Status.FAILED, error)

    def _released(self, session: Session) -> None:
        """A slot is free: the session ended and everything of it is home (R6)."""
        self._model.forget(session.id)
        cut_short = isinstance(session.error, DeadlineExceeded | Stalled)
        rest = session.stretches.rest(session.statistics, cut_short=cut_short)
        if rest and (cut_short or session.status is Status.DONE):
            self._chooser.learn(session.request, session.arrangement, rest)
        self.admission.released(session)
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    # Life ----------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[None]:
        """Run the stages while the block runs; then drain (R11). After a death, leaving raises `EngineDead`."""
        failure: Exception | None = None
        watch = anyio.CancelScope()
        alarm = LagAlarm(self.limits.lag_alarm_s)
        async with anyio.create_task_group() as tasks:
            try:
                for stage in self._stages:
                    tasks.start_soon(self._live, *stage)
                tasks.start_soon(self._watch, watch)
                if self.limits.lag_alarm_s and any(isinstance(w, ThreadWorker) for w in self._workers.values()):
                    alarm.start()  # where time is real
                self._opened = self._accepting = True
                yield
                self._stop_accepting()
                with anyio.move_on_after(self.limits.drain_s):
                    await self._emptied()
            except Exception as error:  # the caller's own; the task group would hide it in an exception group
                failure = error
            finally:
                try:
                    with anyio.CancelScope(shield=True):
                        await self._drain()
                except BaseException as error:  # a native cancel goes through every shield: leave at once
                    self._die(f"draining was cut short by {type(error).__name__}", error)
                    raise
                finally:
                    watch.cancel()
                    alarm.stop()
                    for source in self._sources:
                        source.close()
                    for worker in self._workers.values():  # nothing runs in them, unless the engine is dead
                        worker.abandon()
                        worker.close(0.0 if self.dead else 1.0)
        if failure is not None:
            raise failure
        if self.dead is not None:
            raise self.dead

    async def _live(self, name: str, stage: Stage[Any, Any], inbox: Any, outbox: Any) -> None:
        """The life of a stage. Only its own scope ends it early: a cancelled caller drains first (R11)."""
        scope = anyio.CancelScope(shield=True)
        self._scopes.append(scope)
        try:
            with scope, inbox:
                await stage.run(inbox, outbox)
                if self._accepting or self.switch.live:
                    raise InvariantBroken(f"the stage {name} returned although its inbox was open")
        except BaseException as error:  # a cancelled stage is as dead as one that raised; whoever waits must hear of it
            self._die(f"the stage {name} died of {type(error).__name__}: {error}", error)
            if not isinstance(error, Exception):
                raise
        finally:
            if outbox is not self.switch:
                outbox.close()  # the end travels down the output path by itself
            self._running -= 1
            if self._running == 0:
                self._bury()

    async def _drain(self) -> None:
        """Admission off, finish what is left, wait for thread calls, and see that all is home."""
        self._stop_accepting()
        for session in list(self.switch.live.values()):
            self.end(session, Status.FAILED, NotServing("the pipeline was closed before the session ended"))
        with anyio.move_on_after(self.limits.call_s):
            await self._emptied()
        if self.switch.live:  # a call hangs: stop waiting for it, and for whoever waits for it
            self._die("calls that were running did not end", WorkerLost(f"{list(self.switch.live.values())}"))
            for worker in self._workers.values():
                worker.abandon()
            await self._emptied()

    def _stop_accepting(self) -> None:
        self._accepting = False
        self.admission.close()

    async def _emptied(self) -> None:
        while self.switch.live:
            await self._changed.wait()

    def _die(self, why: str, error: BaseException) -> None:
        """A stage is dead, so the engine is (R10): fail every session, stop every stage, refuse new ones."""
        if self.dead is None:
            self.dead = EngineDead(why)
            self.dead.__cause__ = error
            self.admission.close()
        for session in list(self.switch.live.values()):
            self.end(session, Status.FAILED, EngineDead(why))
        for scope in self._scopes:
            scope.cancel()
        self._change()

    def _bury(self) -> None:
        """No stage runs any more, so nothing is out: what lay in queues or dead hands is released."""
        for session in list(self.switch.live.values()):
            self.switch.bury(session, EngineDead(str(self.dead)))
        self._change()

    async def _watch(self, scope: anyio.CancelScope) -> None:
        watchdog = Watchdog(self.switch, self._workers.values(), self.limits, self._fail)
        with scope:
            while True:
                with anyio.CancelScope(deadline=watchdog.look()):
                    await self._changed.wait()
