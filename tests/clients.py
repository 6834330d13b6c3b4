"""Callers with every kind of bad luck, each comparing what it got to see with the oracle."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import anyio
from fake_datastore import Approximate, Bounded, Neighbours, knn_world
from fakes import Certifying, FakeModel, FakeRetriever, Scattered
from oracle import sequential, sequential_knn

from ralmspec.pipeline import (
    Arrangement,
    Cancelled,
    Committed,
    DeadlineExceeded,
    Done,
    Drafted,
    EngineDead,
    Event,
    InContext,
    KnnLM,
    ModelFailed,
    NotServing,
    Overloaded,
    Pipeline,
    RetrieverFailed,
    RolledBack,
    Sampling,
    SessionStream,
)

RETRIEVERS: dict[str, Callable[[int], FakeRetriever]] = {
    "ordinary": lambda seed: FakeRetriever(documents=300, dimension=8, seed=seed, spread=5),
    "bounded": lambda seed: Certifying(documents=60, dimension=8, seed=seed, spread=5),
    "always hits": lambda seed: FakeRetriever(documents=1, seed=seed),
    "hardly ever hits": lambda seed: Scattered(documents=4096, seed=seed),
    "all tie": lambda seed: FakeRetriever(documents=9, seed=seed, spread=1),
    "duplicates": lambda seed: FakeRetriever(documents=64, dimension=2, seed=seed, spread=2),
}
NEIGHBOURS: dict[str, type[Neighbours]] = {
    "nearest entries": Neighbours,
    "nearest entries, bounded": Bounded,
    "some near entries": Approximate,
}
WORLDS = (*RETRIEVERS, *NEIGHBOURS)
LENGTHS = (6, 9, 14)
"""New tokens that clients ask for."""
PROMPTS = ("3 1 4", "15 9 2 6", "5 3 5 8 9 7 9", "2 7 1 8", "1 4 1 4 2 1", "11 22 17 5")


@dataclass(frozen=True, slots=True)
class World:
    """What decides the right answers."""

    model: FakeModel
    retriever: FakeRetriever
    workload: InContext | KnnLM

    @staticmethod
    @cache
    def of(kind: str, seed: int, stride: int) -> "World":
        """One of a few worlds, so that the oracle need not answer everything anew."""
        if kind in NEIGHBOURS:
            return World(*knn_world(seed=seed, ends=True, retriever=NEIGHBOURS[kind], top_k=(1, 8, 64)[seed % 3]))
        model = FakeModel(seed=seed, stubborn=(0.3, 0.6, 0.9)[seed % 3])
        return World(model, RETRIEVERS[kind](seed), InContext(retrieval_stride=stride))


@cache
def truth(
    world: World, prompt: str, max_new_tokens: int, sampling: Sampling, ignore_eos: bool
) -> tuple[list[int], list[int]]:
    """Tokens, and the document of every step, by the oracle."""
    model, retriever, workload = world.model, world.retriever, world.workload
    given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "ignore_eos": ignore_eos}
    if isinstance(workload, KnnLM):
        return sequential_knn(model, retriever, workload, model.encode(prompt), **given)
    return sequential(model, retriever, model.encode(prompt), retrieval_stride=workload.retrieval_stride, **given)


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
        longest = chance.choice(LENGTHS)
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
        except (NotServing, EngineDead, DeadlineExceeded, Cancelled) as refusal:  # before it began
            self.tally["refused"] += 1
            self.tally["ended in the waiting room"] += isinstance(refusal, DeadlineExceeded | Cancelled)
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
