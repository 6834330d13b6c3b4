"""One simulated run: a pipeline on a shuffled loop, clients with every kind of bad luck, and what must hold after it.

A seed decides everything: arrangement, knowledge base, delays, limits, the order of whatever is ready, and each
client's fate. Each kind of fault is switched on for some runs only, so that some also go far without any.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import anyio
import pytest
from anyio import EndOfStream
from clocks import run
from fakes import FakeModel, FakeRetriever, Scattered, VirtualWorker, draw
from oracle import sequential

from ralmspec.pipeline import (
    OS3,
    Arrangement,
    Asynchronous,
    Cancelled,
    Committed,
    DeadlineExceeded,
    Done,
    Drafted,
    EngineDead,
    Event,
    Inbox,
    InContext,
    Limits,
    ModelFailed,
    NotServing,
    Outbox,
    Overloaded,
    Pipeline,
    RetrieverFailed,
    RolledBack,
    Sampling,
    Sequential,
    SessionStream,
    Synchronous,
)
from ralmspec.stages.arrangement import Outlook
from ralmspec.stages.generate import Generate
from ralmspec.stages.lookup import Lookup
from ralmspec.stages.prefetch import Prefetch
from ralmspec.stages.session import Session
from ralmspec.stages.stride import FixedStride
from ralmspec.stages.verify import Verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Eager:
    """Not one of the library's: drafts as far as the window allows and sends every check at once, so that several
    verifications of a session are under way at the same time."""

    window: int = 3
    prefetch: int = 4
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
    *(
        kind(speculation_stride=stride, prefetch=documents)
        for kind in (Synchronous, Asynchronous)
        for stride in STRIDES
        for documents in (1, 20, 256)
    ),
]
RETRIEVERS: dict[str, Callable[[int], FakeRetriever]] = {
    "ordinary": lambda seed: FakeRetriever(documents=300, dimension=8, seed=seed, spread=5),
    "always hits": lambda seed: FakeRetriever(documents=1, seed=seed),
    "hardly ever hits": lambda seed: Scattered(documents=4096, seed=seed),
    "all tie": lambda seed: FakeRetriever(documents=9, seed=seed, spread=1),
    "duplicates": lambda seed: FakeRetriever(documents=64, dimension=2, seed=seed, spread=2),
}
PROMPTS = ("3 1 4", "15 9 2 6", "5 3 5 8 9 7 9", "2 7 1 8", "1 4 1 4 2 1", "11 22 17 5")


class Bad(Exception):
    """Injected."""


@dataclass(frozen=True, slots=True)
class World:
    """What decides the right answers."""

    model: FakeModel
    retriever: FakeRetriever
    stride: int

    @staticmethod
    @cache
    def of(kind: str, seed: int, stride: int) -> "World":
        """One of a few worlds, so that the oracle need not answer everything anew."""
        model = FakeModel(seed=seed, stubborn=(0.3, 0.6, 0.9)[seed % 3])
        return World(model, RETRIEVERS[kind](seed), stride)


@cache
def truth(
    world: World, prompt: str, max_new_tokens: int, sampling: Sampling, ignore_eos: bool
) -> tuple[list[int], list[int]]:
    """Tokens, and the document of every step, by the oracle."""
    return sequential(
        world.model,
        world.retriever,
        world.model.encode(prompt),
        max_new_tokens=max_new_tokens,
        retrieval_stride=world.stride,
        sampling=sampling,
        ignore_eos=ignore_eos,
    )


@dataclass(slots=True, kw_only=True)
class Luck:
    """Which misfortunes a run may have, and how often each; `seed` draws the rest."""

    seed: int
    arrangement: Arrangement | None = None
    clients: int = 50
    cancels: float = 0.05
    deadlines: float = 0.02
    slow: float = 0.05
    faults: float | None = None
    """Share of worker calls that fail; None: drawn, often 0."""
    dies: bool | None = None
    """Whether a stage dies at a random moment; None: in one run of eight."""
    drains: bool | None = None
    """Whether the pipeline is left while clients are busy; None: in one run of eight."""


class Citing:
    """An output stage of a user's own: passes everything on, sometimes after a pause; may be made to fail."""

    def __init__(self, chance: random.Random, dies_after: float = float("inf")) -> None:
        self._chance = chance
        self._left = dies_after

    async def run(self, inbox: Inbox[Event], outbox: Outbox[Event]) -> None:
        while True:
            try:
                event = await inbox.receive()
            except EndOfStream:
                return
            self._left -= 1
            if self._left < 0:
                raise Bad("the user's stage")
            if self._chance.random() < 0.1:
                await anyio.sleep(self._chance.expovariate(100))
            await outbox.send(event)


@dataclass(slots=True, kw_only=True)
class Client:
    """One caller, its fate, and what it got to see."""

    number: int
    chance: random.Random
    luck: Luck
    world: World
    tally: Counter[str]
    tokens: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    drafts: dict[int, list[int]] = field(default_factory=dict)
    ends: list[object] = field(default_factory=list)

    async def live(self, pipeline: Pipeline) -> None:
        """Arrive, try until there is a slot, read as the fate will have it, and compare with the oracle."""
        chance, luck = self.chance, self.luck
        await anyio.sleep(chance.expovariate(5))
        prompt = chance.choice(PROMPTS)
        longest = chance.choice((6, 9, 14))
        sampling = Sampling(temperature=0.7, seed=self.number % 3) if chance.random() < 0.1 else Sampling()
        ignore_eos = chance.random() < 0.2
        drafts = chance.random() < 0.3
        cancels = chance.random() < luck.cancels
        hurried = chance.random() < luck.deadlines
        slow = chance.random() < luck.slow
        tokens, documents = truth(self.world, prompt, longest, sampling, ignore_eos)

        while True:
            stream = pipeline.session(
                prompt,
                max_new_tokens=longest,
                sampling=sampling,
                ignore_eos=ignore_eos,
                drafts=drafts,
                trace=drafts,
                deadline_s=chance.expovariate(4) if hurried else float("inf"),
            )
            try:
                if cancels:
                    await self._cut_short(stream)
                else:
                    await self._read(stream, slow)
                break
            except Overloaded as refusal:
                self.tally["overloaded"] += 1
                await anyio.sleep(refusal.retry_after_s * chance.uniform(0.1, 8))

        complete = isinstance(self.ends[0], Done)
        assert len(self.ends) == 1, f"ended more than once: {self.ends}"
        if complete:
            assert self.tokens == tokens, f"client {self.number}: {self.tokens}, the oracle {tokens}"
            assert self.documents == documents
        else:
            assert self.tokens == tokens[: len(self.tokens)], f"client {self.number}: {self.tokens} of {tokens}"
            assert self.documents == documents[: len(self.documents)]
        self.tally["completed" if complete else "cut"] += 1
        self.tally["slow"] += slow

    async def _cut_short(self, stream: SessionStream) -> None:
        """Four ways: from outside the block, by `cancel`, by leaving, and by leaving at once."""
        way, after = self.chance.randrange(4), self.chance.expovariate(4)
        if way == 0:
            with anyio.move_on_after(after):
                await self._read(stream)
        elif way == 1:

            def cancel() -> None:
                with suppress(RuntimeError):  # not entered yet, so there is nothing to cancel
                    stream.cancel()

            timer = asyncio.get_running_loop().call_later(after, cancel)
            try:
                await self._read(stream)
            finally:
                timer.cancel()
        else:
            await self._read(stream, events=self.chance.randrange(6) if way == 2 else 0)
        if not self.ends:  # cut before the stream's own end
            self.ends.append("left")
        self.tally["cancelled"] += not isinstance(self.ends[0], Done)

    async def _read(self, stream: SessionStream, slow: bool = False, events: int = 1 << 30) -> None:
        try:
            async with stream:
                self.tally["sessions"] += 1
                with noted(self.ends):
                    while events > 0 and not self.ends:
                        self._see(await anext(stream))
                        events -= 1
                        if slow and self.chance.random() < 0.5:
                            await anyio.sleep(self.chance.expovariate(0.5))
        except (NotServing, EngineDead) as refusal:
            self.tally["refused"] += 1
            self.ends.append(refusal)

    def _see(self, event: Event) -> None:
        match event:
            case Committed():
                assert event.step == len(self.documents), "steps come in order, none missing"
                drafted = self.drafts.pop(event.step, [])
                assert drafted == list(event.tokens[: len(drafted)]), "a draft was committed as something else"
                self.tokens += event.tokens
                self.documents.append(event.document.id)
            case Drafted():
                self.drafts.setdefault(event.step, []).append(event.token)
            case RolledBack():
                self.drafts = {step: tokens for step, tokens in self.drafts.items() if step < event.step}
            case Done(statistics=statistics):
                assert event.error is None
                assert statistics.new_tokens == len(self.tokens) and statistics.steps == len(self.documents)
                self.ends.append(event)
            case _:
                raise AssertionError(f"what is {event!r}?")


@contextmanager
def noted(ends: list[object]) -> Iterator[None]:
    """A stream's typed end is an end; `StopAsyncIteration` without one is not."""
    try:
        yield
    except (Cancelled, DeadlineExceeded, RetrieverFailed, ModelFailed, NotServing, EngineDead) as error:
        ends.append(error)
    except StopAsyncIteration:
        raise AssertionError("a stream ended without Done and without an error") from None


@dataclass(slots=True)
class Book:
    """Every session there was, and how often each came to its end."""

    ends: Counter[Session] = field(default_factory=Counter)
    stale: int = 0
    rollbacks: int = 0


@contextmanager
def bookkeeping() -> Iterator[Book]:
    """Watch sessions from outside."""
    book = Book()
    begin, finish, is_stale = Session.__init__, Session.finish, Session.is_stale

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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", noted_init)
        patch.setattr(Session, "finish", noted_finish)
        patch.setattr(Session, "is_stale", noted_stale)
        yield book
    book.rollbacks = sum(session.statistics.rollbacks for session in book.ends)


class Deathbed:
    """The inbox of a stage that dies at a certain turn, with or without that turn in its hands."""

    def __init__(self, inbox: Any, moment: int, empty_handed: bool) -> None:
        self.inbox = inbox
        self.moment = moment
        self.empty_handed = empty_handed

    async def receive(self) -> Any:
        self._before()
        return self._after(await self.inbox.receive())

    def receive_nowait(self) -> Any:
        self._before()
        return self._after(self.inbox.receive_nowait())

    def _before(self) -> None:
        self.moment -= 1
        if self.moment <= 0 and self.empty_handed:
            raise Bad("deadly, before a turn")

    def _after(self, turn: Any) -> Any:
        if self.moment <= 0:
            raise Bad("deadly, with a turn")
        return turn


@contextmanager
def deadly(stage: type[Any], moment: int, empty_handed: bool) -> Iterator[None]:
    """One of the four stages dies at its so manieth turn."""
    original = stage.run

    async def run_to_death(self: Any, inbox: Any, outbox: Any) -> None:
        await original(self, Deathbed(inbox, moment, empty_handed), outbox)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "run", run_to_death)
        yield


STAGES = (Lookup, Generate, Verify, Prefetch)


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
    world = World.of(chance.choice(list(RETRIEVERS)), chance.randrange(3), chance.choice((2, 3)))
    arrangement = luck.arrangement or chance.choice(ARRANGEMENTS)
    world.retriever.concurrency = chance.choice((1, 1, 2, 4))
    delay = delays(chance)
    rate = chance.choice((0.0, 0.0, 0.003, 0.03)) if luck.faults is None else luck.faults
    dies = chance.random() < 1 / 8 if luck.dies is None else luck.dies
    drains = chance.random() < 1 / 8 if luck.drains is None else luck.drains
    outside = dies and chance.random() < 0.3
    output = [Citing(chance, dies_after=chance.randrange(100) if outside else float("inf"))]
    limits = Limits(
        sessions=chance.choice((1, 2, 5, 16, 64)),
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
        workload=InContext(retrieval_stride=world.stride),
        speculation=arrangement,
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
        assert not pipeline.ready
        assert asyncio.all_tasks() == {asyncio.current_task()}, "tasks were left behind"

    world.model.forgotten.clear()
    with bookkeeping() as book, death if dies and not outside else nullcontext():
        run(main, seed=luck.seed)
    settled(book, clients, world)
    tally["rollbacks"], tally["stale"] = book.rollbacks, book.stale
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
        assert session.home and not session.steps and not session.checks, f"not all is home: {session}"
    assert sorted(world.model.forgotten) == sorted(session.id for session in book.ends), "forgotten once each"
