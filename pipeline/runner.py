"""Runs the stages: queues, the only task group, admission, deadlines, the watchdog, death, and draining."""

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import anyio
from anyio import create_memory_object_stream
from anyio.abc import TaskGroup

from ralmspec.retrievers.base import Retriever
from ralmspec.retrievers.cache import SessionCache
from ralmspec.stages.arrangement import Arrangement
from ralmspec.stages.generate import Generate
from ralmspec.stages.lookup import Lookup
from ralmspec.stages.messages import Event, Turn
from ralmspec.stages.model import LanguageModel
from ralmspec.stages.prefetch import Prefetch
from ralmspec.stages.session import Request, Session, Status
from ralmspec.stages.stage import Inbox, Outbox, Stage, Worker
from ralmspec.stages.switch import Sink, Switch
from ralmspec.stages.verify import Verify
from ralmspec.stages.workload import BoundWorkload

from .errors import DeadlineExceeded, EngineDead, NotServing, Overloaded, Stalled


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a pipeline. Times in seconds."""

    sessions: int = 512
    """Sessions live at once; one more is refused with `Overloaded`."""
    cached_documents: int = 4096
    """Documents a session's cache holds (LRU beyond)."""
    unread_events: int = 64
    """Events a caller may leave unread before its session pauses."""
    stall_s: float = 120.0
    """A session that could act and makes no progress for so long is failed with `Stalled`."""
    call_s: float = 300.0
    """A call into model, encoder or index that takes longer counts as hung: `EngineDead`."""
    drain_s: float = 30.0
    """How long leaving the pipeline lets live sessions go on."""

    def __post_init__(self) -> None:
        for name in ("sessions", "cached_documents", "unread_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"Limits({name}={getattr(self, name)}): must be at least 1")


class Runner:
    """Everything of a pipeline that lives while it is open."""

    def __init__(
        self,
        *,
        model: LanguageModel,
        retriever: Retriever,
        workload: BoundWorkload,
        arrangement: Arrangement,
        output: Sequence[Stage[Event, Event]],
        limits: Limits,
        worker: Callable[[str, int], Worker],
    ) -> None:
        self.limits = limits
        self.dead: EngineDead | None = None
        self._model = model
        self._retriever = retriever
        self._workload = workload
        self._arrangement = arrangement
        self._accepting = False
        self._ids: Iterator[int] = count(1)
        self._changed = anyio.Event()
        self._scopes: list[anyio.CancelScope] = []
        self._running = 0
        self._mean_session_s = 1.0

        searches = max(1, retriever.concurrency)
        self._workers: dict[str, Worker] = {
            name: worker(name, threads)
            for name, threads in (("model", 1), ("encoder", 1), ("index", searches), ("prefetch", 1))
        }
        n = limits.sessions
        lookup_in, lookup = create_memory_object_stream[Turn](n)
        generate_in, generate = create_memory_object_stream[Turn](n)
        verify_in, verify = create_memory_object_stream[Turn](n)
        prefetch_in, prefetch = create_memory_object_stream[Turn](n)
        # What a session may have unread, and what the work in flight can still add to it: commits and retractions.
        events = n * (limits.unread_events + 4 * arrangement.window + 4)
        ends: list[Any] = [create_memory_object_stream[Event](events) for _ in range(len(output) + 1 if output else 0)]
        self.switch = Switch(
            lookup=lookup_in,
            generate=generate_in,
            verify=verify_in,
            prefetch=prefetch_in,
            output=ends[0][0] if output else None,
            now=anyio.current_time,
            released=self._released,
        )
        self._open_ends: list[Any] = [lookup_in, generate_in, verify_in, prefetch_in]

        live, now, workers = self.switch.live, anyio.current_time, self._workers
        k = max(arrangement.prefetch, workload.top_k)
        keep = workload.top_k if arrangement.guesses else 0
        self._stages: list[tuple[str, Stage[Any, Any], Any, Any]] = [
            ("lookup", Lookup(live, retriever, workers["encoder"], now), lookup, self.switch),
            ("generate", Generate(live, model, workload, workers["model"], now), generate, self.switch),
            ("prefetch", Prefetch(live, retriever, workers["prefetch"], now), prefetch, self.switch),
        ]
        asking = Verify(live, retriever, workers["index"], now, k=k, keep=keep)
        self._stages += [("verify", asking, verify.clone(), self.switch) for _ in range(searches)]
        verify.close()
        for place, stage in enumerate(output):
            name = type(stage).__name__
            self._stages.append((name, stage, ends[place][1], ends[place + 1][0]))
        if output:
            self._open_ends.append(ends[0][0])
            self._stages.append(("output", Delivery(self.switch), ends[-1][1], self.switch))

    @property
    def accepting(self) -> bool:
        """Readiness: whether new sessions are served."""
        return self._accepting and self.dead is None

    # Admission -----------------------------------------------------------------------------------------------------

    def admit(self, request: Request) -> tuple[Session, Sink]:
        """Take a slot and begin, all in one section (R1). Raises `Overloaded`, `NotServing` or `EngineDead`."""
        self.refuse_if_closed()
        session_id = next(self._ids)  # never used again (R4)
        session = Session(
            session_id,
            request,
            workload=self._workload,
            arrangement=self._arrangement,
            cache=SessionCache(self._retriever, capacity=self.limits.cached_documents),
            render=self._model.decode,
            emit=self.switch.emit,
            now=anyio.current_time,
        )
        sink = Sink()
        self.switch.live[session_id] = session
        self.switch.sinks[session_id] = sink
        self.switch.send_nowait(session)
        self._change()
        return session, sink

    def refuse_if_closed(self) -> None:
        """Raise what `admit` would raise now."""
        if self.dead is not None:
            raise self.dead
        if not self._accepting:
            raise NotServing("the pipeline is not open: enter it with `async with`, and open sessions inside")
        if len(self.switch.live) >= self.limits.sessions:
            message = f"all {self.limits.sessions} slots are taken: try again later, or raise Limits(sessions=...)"
            raise Overloaded(message, retry_after_s=self._mean_session_s)

    def end(self, session: Session, status: Status, error: BaseException | None = None) -> None:
        """Finish a session from outside the stages, and let go of what is not out."""
        session.finish(status, error)
        self.switch.send_nowait(session)

    def _released(self, session: Session) -> None:
        """A slot is free: the session ended and everything of it is home (R6)."""
        self._model.forget(session.id)
        self._mean_session_s += 0.1 * (session.statistics.latency_s - self._mean_session_s)
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    # Life ----------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def serve(self) -> AsyncGenerator[None]:
        """Run the stages while the block runs; then drain (R11). After a death, leaving raises `EngineDead`."""
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            for name, stage, inbox, outbox in self._stages:
                self._start(tasks, name, stage, inbox, outbox)
            watch = anyio.CancelScope()
            tasks.start_soon(self._watch, watch)
            self._accepting = True
            patience = 0.0
            try:
                yield
                patience = self.limits.drain_s
            except Exception as error:  # the caller's own; the task group would hide it in an exception group
                failure = error
            finally:
                with anyio.CancelScope(shield=True):
                    await self._drain(patience)
                watch.cancel()
                for end in self._open_ends:
                    end.close()
        if failure is not None:
            raise failure
        if self.dead is not None:
            raise self.dead

    def _start(self, tasks: TaskGroup, name: str, stage: Stage[Any, Any], inbox: Any, outbox: Any) -> None:
        scope = anyio.CancelScope()
        self._scopes.append(scope)
        self._running += 1

        async def live() -> None:
            try:
                with scope, inbox:
                    await stage.run(inbox, outbox)
                    if self._accepting or self.switch.live:
                        raise EngineDead(f"the stage {name} returned although its inbox was open")
            except anyio.get_cancelled_exc_class():
                raise
            except Exception as error:
                self._die(name, error)
            finally:
                if outbox is not self.switch:
                    outbox.close()  # the end travels down the output path by itself
                self._running -= 1
                if self._running == 0:
                    self._bury()
                self._change()

        tasks.start_soon(live, name=f"ralmspec {name}")

    async def _drain(self, patience_s: float) -> None:
        """Admission off, let sessions end, finish the rest, wait for thread calls, and see that all is home."""
        self._accepting = False
        with anyio.move_on_after(patience_s):
            await self._emptied()
        for session in list(self.switch.live.values()):
            self.end(session, Status.FAILED, NotServing("the pipeline was closed before the session ended"))
        with anyio.move_on_after(self.limits.call_s):
            await self._emptied()
        if self.switch.live:  # a call hangs: stop waiting for it, and for whoever waits for it
            self._die("drain", EngineDead(f"calls did not end: {[s.id for s in self.switch.live.values()]}"))
            for worker in self._workers.values():
                worker.abandon()
            await self._emptied()
        for worker in self._workers.values():
            worker.close(0.0 if self.dead else self.limits.call_s)

    async def _emptied(self) -> None:
        while self.switch.live:
            await self._changed.wait()

    def _die(self, name: str, error: BaseException) -> None:
        """A stage is dead, so the engine is (R10): fail every session, stop every stage, refuse new ones."""
        if self.dead is None:
            self.dead = EngineDead(f"the stage {name} died: {type(error).__name__}: {error}")
            self.dead.__cause__ = error
        for session in list(self.switch.live.values()):
            self.end(session, Status.FAILED, self.dead)
        for scope in self._scopes:
            scope.cancel()

    def _bury(self) -> None:
        """No stage runs any more, so nothing is out: what lay in queues or dead hands is released."""
        for session in list(self.switch.live.values()):
            session.finish(Status.FAILED, self.dead or NotServing("the pipeline was closed"))
            if session.closing_out:  # its last event is lost on the output path
                self.switch.deliver(session.last_event())
            session.lost()
            self.switch.send_nowait(session)

    async def _watch(self, scope: anyio.CancelScope) -> None:
        """Deadlines, and the watchdog (R12). Sleeps until the next instant at which something could be late."""
        with scope:
            while True:
                now = anyio.current_time()
                for session in list(self.switch.live.values()):
                    if session.final:
                        continue
                    if session.request.deadline <= now:
                        self.end(
                            session, Status.FAILED, DeadlineExceeded("the session did not end before its deadline")
                        )
                    elif session.blocked_by_reader:
                        session.progress = now  # a reader that stays away is its deadline's business
                    elif now - session.progress >= self.limits.stall_s:
                        self.end(
                            session, Status.FAILED, Stalled(f"no progress for {self.limits.stall_s:g} s: {session}")
                        )
                instants = [
                    min(session.request.deadline, session.progress + self.limits.stall_s)
                    for session in self.switch.live.values()
                    if not session.final
                ]
                with anyio.CancelScope(deadline=min(instants, default=float("inf"))):
                    await self._changed.wait()


class Delivery:
    """Last stage of the output path: hands events to their readers, and wakes the session that ended."""

    def __init__(self, switch: Switch) -> None:
        self._switch = switch

    async def run(self, inbox: Inbox[Event], outbox: Outbox[Session]) -> None:
        """Serve until the inbox ends."""
        while True:
            try:
                event = await inbox.receive()
            except anyio.EndOfStream:
                return
            self._switch.deliver(event)
            session = self._switch.live.get(event.session)
            if session is not None:
                outbox.send_nowait(session)
