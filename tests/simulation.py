"""One simulated run: a pipeline on a shuffled loop, clients with every kind of bad luck, and what must hold after it.

A seed decides everything: arrangement, knowledge base, delays, limits, the order of whatever is ready, and each
client's fate. Each kind of fault is switched on for some runs only, so that some also go far without any.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from clients import LENGTHS, WORLDS, Client, Luck, World
from clocks import run
from fakes import Guessing, VirtualWorker, draw
from faults import STAGES, Bad, deadly

from ralmspec.pipeline import (
    OS3,
    Adaptive,
    Arrangement,
    Asynchronous,
    Continuous,
    EngineDead,
    Event,
    Inbox,
    Limits,
    ModelFailed,
    Outbox,
    Pipeline,
    RetrieverFailed,
    Sequential,
    Speculation,
    Statistics,
    Synchronous,
)
from ralmspec.stages import stretch
from ralmspec.stages.arrangement import Outlook
from ralmspec.stages.request import Request
from ralmspec.stages.session import Session
from ralmspec.stages.sink import Sink
from ralmspec.stages.stride import FixedStride
from ralmspec.stages.switch import Switch


@dataclass(frozen=True, slots=True, kw_only=True)
class Eager:
    """Not one of the library's: drafts as far as the window allows, and sends checks out whenever it may."""

    window: int = 3
    flights: int = 1
    prefetch: int = 4
    token_check: bool = False
    certified_skip: bool = True
    asks_drafter: bool = True
    guesses = True

    def stride(self) -> FixedStride:
        return FixedStride(1)

    def may_draft(self, outlook: Outlook) -> bool:
        return True

    def checks_due(self, outlook: Outlook) -> bool:
        return True


STRIDES: tuple[int | OS3, ...] = (1, 3, 8, OS3())
ARRANGEMENTS: list[Arrangement] = [
    Sequential(),
    Eager(window=2),
    Eager(window=4),
    Eager(window=5, flights=3),
    Eager(window=4, token_check=True),
    Eager(window=6, flights=3, token_check=True),
    Continuous(window=6, flights=2, prefetch=20),
    Continuous(window=16, prefetch=1),
    Continuous(window=9, token_check=False),
    Synchronous(speculation_stride=4, prefetch=20, token_check=True),
    Asynchronous(speculation_stride=3, prefetch=1, token_check=True),
    *(
        kind(speculation_stride=stride, prefetch=documents)
        for kind in (Synchronous, Asynchronous)
        for stride in STRIDES
        for documents in (1, 20, 256)
    ),
]


class Restless:
    """Serves every stretch otherwise than the last."""

    def __init__(self, chance: random.Random) -> None:
        self.window = max(arrangement.window for arrangement in ARRANGEMENTS)
        self.flights = max(arrangement.flights for arrangement in ARRANGEMENTS)
        self.learned = 0
        self._chance = chance

    def choose(self, request: Request) -> Arrangement:
        return self._chance.choice(ARRANGEMENTS)

    def learn(self, request: Request, arrangement: Arrangement, statistics: Statistics) -> None:
        self.learned += 1


class Citing:
    """An output stage of a user's own: passes everything on, sometimes after a pause; may be made to fail."""

    def __init__(self, chance: random.Random, dies_after: float = float("inf")) -> None:
        self._chance = chance
        self._left = dies_after

    async def run(self, inbox: Inbox[Event], outbox: Outbox[Event]) -> None:
        async for event in inbox:
            self._left -= 1
            if self._left < 0:
                raise Bad("the user's stage")
            if self._chance.random() < 0.1:
                await anyio.sleep(self._chance.expovariate(100))
            await outbox.send(event)


@dataclass(slots=True)
class Book:
    """Every session there was, and how often each came to its end."""

    ends: Counter[Session] = field(default_factory=Counter)
    stale: int = 0
    rollbacks: int = 0


@contextmanager
def bookkeeping(limits: Limits, kv_tokens: int, room: int) -> Iterator[Book]:
    """Watch sessions from outside, and that no more of them are live than may be."""
    book = Book()
    begin, finish, is_stale, register = Session.__init__, Session.finish, Session.is_stale, Switch.register

    def noted_init(self: Session, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        book.ends[self] = 0

    def noted_finish(self: Session, *arguments: Any) -> None:
        book.ends[self] += not self.final
        finish(self, *arguments)

    def noted_stale(self: Session, epoch: int) -> bool:
        stale = is_stale(self, epoch)
        book.stale += stale and not self.final
        return stale

    def noted_register(self: Switch, session: Session) -> Sink:
        sink = register(self, session)
        assert len(self.live) <= limits.sessions, "more sessions than slots"
        assert sum(room + live.request.max_new_tokens for live in self.live.values()) <= kv_tokens, "too much KV memory"
        return sink

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", noted_init)
        patch.setattr(Switch, "register", noted_register)
        patch.setattr(Session, "finish", noted_finish)
        patch.setattr(Session, "is_stale", noted_stale)
        yield book
    book.rollbacks = sum(session.statistics.rollbacks for session in book.ends)


def delays(chance: random.Random) -> Callable[[str], float]:
    """Seconds for each kind of call: fixed, random, or none at all; b/a from 0 to about 30."""
    means = {name: chance.choice((0.0, 0.002, 0.01)) for name in ("model", "encoder", "prefetch")}
    means["index"] = chance.choice((0.0, 0.005, 0.03, 0.2))
    if chance.random() < 0.3:
        return lambda name: means[name]
    return lambda name: chance.expovariate(1 / means[name]) if means[name] else 0.0


def simulate(luck: Luck) -> Counter[str]:
    """Run it, check it, and count what happened."""
    chance = random.Random(luck.seed)
    tally: Counter[str] = Counter()
    world = World.of(chance.choice(WORLDS), chance.randrange(3), chance.choice((2, 3)))
    restless = Restless(random.Random(f"{luck.seed} arrangements"))
    speculations: list[Speculation] = [*ARRANGEMENTS, Adaptive(), Adaptive(), *[restless] * 6]
    speculation = luck.arrangement or chance.choice(speculations)
    steps = random.Random(f"{luck.seed} steps").choice((1, 2, 5, stretch.STEPS))
    world.retriever.concurrency = chance.choice((1, 1, 2, 4))
    world.model.max_batch = chance.choice((1, 2, 8, 64))
    world.model.halts = chance.choice((0.0, 0.0, 0.3))
    delay = delays(chance)
    rate = chance.choice((0.0, 0.0, 0.003, 0.03)) if luck.faults is None else luck.faults
    dies = chance.random() < 1 / 8 if luck.dies is None else luck.dies
    drains = chance.random() < 1 / 8 if luck.drains is None else luck.drains
    outside = dies and chance.random() < 0.3
    output = [Citing(chance, dies_after=chance.randrange(100) if outside else float("inf"))]
    room = world.workload.bind(world.model, world.retriever).room()
    most = room + max(LENGTHS)
    world.model.kv_tokens = chance.choice((1 << 30, 1 << 30, most, 3 * most))
    limits = Limits(
        sessions=chance.choice((1, 2, 5, 16, 64)),
        waiting=chance.choice((0, 1, 8)),
        cached_documents=chance.choice((1, 3, 4096)),
        unread_events=chance.choice((1, 2, 3, 64)),
        drain_s=chance.choice((1e-3, 0.3, 30.0)) if drains else 30.0,
    )
    leave_at = chance.expovariate(1)
    death = deadly(chance.choice(STAGES), chance.randrange(1, 60), chance.random() < 0.5)

    def fault(name: str) -> None:
        if chance.random() < rate:
            tally["faults"] += 1
            raise ModelFailed("injected") if name == "model" else RetrieverFailed("injected")

    pipeline = Pipeline(
        model=world.model,
        retriever=world.retriever,
        drafter=Guessing(world.retriever) if chance.random() < 0.3 else None,
        workload=world.workload,
        speculation=speculation,
        output=output if outside or chance.random() < 0.3 else (),
        limits=limits,
        worker=lambda name, threads: VirtualWorker(name, delay, fault),
    )
    clients = [
        Client(number=n, chance=random.Random(draw(luck.seed, n)), luck=luck, world=world, tally=tally)
        for n in range(luck.clients)
    ]

    async def main() -> None:
        async with anyio.create_task_group() as callers:
            try:
                async with pipeline, anyio.create_task_group() as inside:
                    for client in clients:
                        (callers if drains else inside).start_soon(client.live, pipeline)
                    if drains:
                        await anyio.sleep(leave_at)
                tally["drains"] += drains
            except EngineDead as death:
                assert isinstance(death.__cause__, Bad), "a stage died by itself"
                tally["deaths"] += 1
            assert pipeline.live_sessions == 0, "left with live sessions"
        assert pipeline.waiting_sessions == 0, "somebody was left in the waiting room"
        assert not pipeline.ready
        assert asyncio.all_tasks() == {asyncio.current_task()}, "tasks were left behind"

    world.model.forgotten.clear()
    death_or_none = death if dies and not outside else nullcontext()
    with bookkeeping(limits, world.model.kv_tokens, room) as book, death_or_none, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretch, "STEPS", steps)
        run(main, seed=luck.seed)
    settled(book, clients, world)
    tally["rollbacks"], tally["stale"], tally["stretches"] = book.rollbacks, book.stale, restless.learned
    tally["certified"] = sum(session.statistics.certified for session in book.ends)
    tally["certified in stretches"] = min(tally["certified"], tally["stretches"])
    for client in clients:
        tally[type(client.ends[0]).__name__] += 1
    assert rate or not tally["RetrieverFailed"] + tally["ModelFailed"], "a fault that nobody made"
    assert drains or not tally["NotServing"], "refused by an open pipeline"
    assert dies or not tally["EngineDead"], "dead without a reason"
    return tally


def settled(book: Book, clients: list[Client], world: World) -> None:
    """Nothing lost and nothing left, after all is over."""
    assert all(len(client.ends) == 1 for client in clients), "a client was lost"
    for session, ends in book.ends.items():
        assert ends == 1, f"ended {ends} times: {session}"
        assert session.home and not session.transcript.steps and not session.checks.queued, (
            f"not all is home: {session}"
        )
    assert sorted(world.model.forgotten) == sorted(session.id for session in book.ends), "forgotten once each"
