"""Rule R10 of the cycle: who a fault hits, and what a death is. See `test_rules.py`."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import anyio
import numpy as np
import pytest
from clocks import run
from fakes import (
    VOCABULARY,
    AlwaysMisses,
    Arguments,
    FakeModel,
    FakeRetriever,
    Result,
    VirtualWorker,
    Workers,
    draw,
    fixed,
)
from faults import STAGES, Bad, deadly
from oracle import sequential
from scenes import PROMPT, TOKENS, Lingers, exact, opened

from ralmspec.pipeline import (
    Answer,
    Arrangement,
    Asynchronous,
    Cancelled,
    Continuous,
    DeadlineExceeded,
    EngineDead,
    ModelFailed,
    Ranking,
    RetrieverFailed,
    Sequential,
    SessionStream,
    Synchronous,
)
from ralmspec.retrievers.base import Ids, Query, Scores
from ralmspec.stages.errors import WorkerLost
from ralmspec.stages.model import Frontier, Prefix, token_by_token
from ralmspec.stages.verify import Verify

# R10 Fault scope -------------------------------------------------------------------------------------------------

UNLUCKY = "9 9 9"


class Choosy(FakeRetriever):
    """Cannot score the question of one session, or raises for whoever is in a call with it."""

    def __init__(self, where: str) -> None:
        super().__init__(documents=1)
        self.where = where

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        self._refuse("encode", queries)
        return super().encode(queries)

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        self._refuse("search", queries)
        return super().search(queries, k)

    def _refuse(self, where: str, queries: Sequence[Query]) -> None:
        if self.where == where and any(query.text.startswith(f"{UNLUCKY} ") for query in queries):
            raise ValueError(where)

    def score(self, query: Any, rows: Any) -> Any:
        if self.where == "score" and query.text.startswith(f"{UNLUCKY} ") and isinstance(rows, np.ndarray):
            raise ValueError("score")
        return super().score(query, rows)

    def _rank(self, query: Any, k: int) -> Ranking:
        return Ranking(np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.float32))


class Moody(FakeModel):
    """Continues several prefixes at once; one session it cannot ask for, not continue, or not write down."""

    max_batch = 8

    def __init__(self, where: str) -> None:
        super().__init__(ends=False)
        self.where = where
        self.unwritable: list[int] = []
        self.together = 0

    def decode(self, tokens: Any) -> str:
        text = super().decode(tokens)
        if self.where == "query" and text.startswith(UNLUCKY) and len(tokens) == 7:
            raise ValueError("query")
        if self.where.startswith("text") and list(tokens) == self.unwritable:
            raise ValueError("text")
        return text

    def forward(self, prefixes: Any) -> list[Frontier | Exception | None]:
        frontiers = super().forward(prefixes)
        for place, prefix in enumerate(prefixes):
            if bytes([9, 9, 9]) in bytes(prefix.tokens.tolist()):
                self.together += len(prefixes) > 1
                if self.where == "pass" and len(prefix.tokens) > 10:
                    raise ValueError("pass")
                if self.where == "logits" and len(prefix.tokens) > 10:
                    frontiers[place] = token_by_token(prefix, lambda tokens: Frontier(np.full(VOCABULARY, np.nan)))
        return frontiers


@pytest.mark.parametrize(
    "where", ["query", "encode", "search", "pass", "score", "logits", "text when decoded", "text when judged"]
)
def test_r10_one_sessions_fault_is_its_own(where: str) -> None:
    """Sessions that are together in every batch, one of which cannot be served: the others must not notice."""
    run(one_unlucky, where)


async def one_unlucky(where: str) -> None:
    model, retriever = Moody(where), Choosy(where)
    if where.startswith("text"):
        model.unwritable = sequential(model, retriever, [9, 9, 9], max_new_tokens=4, retrieval_stride=2)[0]
    pipeline = opened(
        model=model,
        retriever=retriever,
        speculation=Sequential() if where == "text when decoded" else Synchronous(speculation_stride=3),
        worker=fixed(model=0.1, index=0.1, encoder=0.1),
    )
    async with pipeline, anyio.create_task_group() as callers:
        async with pipeline.session(PROMPT):  # keeps the encoder busy until all the others wait for it
            await anyio.sleep(0.05)
            for prompt in ("3 1 4", "2 7 1 8"):
                callers.start_soon(exact, pipeline, prompt)
            await anyio.sleep(0.01)
        with pytest.raises((ValueError, ModelFailed, RetrieverFailed), match=where.split()[0]):
            await pipeline.complete(UNLUCKY, max_new_tokens=TOKENS)
    assert model.together, "they were in no batch together"


class Wrong(FakeRetriever):
    """What is true changes from query to query; a cache always guesses the document of the one before."""

    def __init__(self, bad: int) -> None:
        super().__init__(documents=200)
        self.bad = bad
        self.searched = 0

    def _rank(self, query: Query, k: int) -> Ranking:
        own = draw(query.text) % (len(self) - 1) + 1
        if self.searched == 0 and k > 1:  # what is found first brings the bad one along, and the cache likes it best
            return Ranking(np.array([own, self.bad]), np.array([2, 1], dtype=np.float32))
        return Ranking(np.array([own]), np.ones(1, dtype=np.float32))

    def rows(self, ids: Ids) -> Scores:
        return np.asarray(ids == self.bad, dtype=np.float32)[:, None]

    def score(self, query: Query, rows: Any) -> Scores:
        return np.asarray(rows[:, 0], dtype=np.float32)


class Cannot(FakeModel):
    """Cannot read anything under one document: it fails the prefix, or raises."""

    def __init__(self, document: int, raises: bool = False) -> None:
        super().__init__(ends=False)
        self.document = document
        self.raises = raises
        self.refused = 0

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        outcomes = super().forward(prefixes)
        for place, prefix in enumerate(prefixes):
            if prefix.tokens[0] == self.document % VOCABULARY and prefix.tokens[1] == self.document // VOCABULARY:
                self.refused += 1
                outcomes[place] = ModelFailed("cannot read this")
                if self.raises:
                    raise ValueError("cannot read this")
        return outcomes


@pytest.mark.parametrize(
    "speculation",
    [
        Synchronous(speculation_stride=3, prefetch=20),
        Asynchronous(speculation_stride=2, prefetch=20),
        Continuous(window=6, flights=2, prefetch=20),
    ],
    ids=lambda speculation: type(speculation).__name__,
)
@pytest.mark.parametrize("seconds", [{"model": 0.1, "index": 0.25}, {"model": 0.1, "index": 0.01}, {"model": 0.1}])
@pytest.mark.parametrize("raises", [False, True], ids=["fails it", "raises"])
def test_r10_a_guess_that_cannot_be_written_under_is_no_fault(
    speculation: Arrangement, seconds: Any, raises: bool
) -> None:
    """Sequential serving would never have met it: so the answer is the same, and nobody fails."""
    model = Cannot(document=0, raises=raises)

    async def main() -> None:
        async with opened(
            model=model, retriever=Wrong(bad=0), speculation=speculation, worker=fixed(**seconds)
        ) as pipeline:
            answer = await exact(pipeline)
        assert 0 < model.refused <= answer.statistics.rollbacks, "it is not tried again and again"

    run(main)


class FailsOnce(AlwaysMisses):
    """Two searches at once; the n-th one fails."""

    concurrency = 2

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        if len(self.searches) + 1 == self.n:
            self.searches.append(0)
            raise RetrieverFailed("once")
        return super().search(queries, k)


def test_r10_a_search_that_fails_for_nobody_any_more_is_no_fault() -> None:
    """Of two batches in flight the first one is found wrong, so the other is stale when it fails."""

    async def main() -> list[int]:
        survived = []
        for n in range(1, 7):
            speculation = Continuous(window=8, flights=2, token_check=False)
            worker = fixed(model=0.1, index=0.75, encoder=0.02)
            async with opened(retriever=FailsOnce(n), speculation=speculation, worker=worker) as pipeline:
                with suppress(RetrieverFailed):
                    await exact(pipeline)
                    survived.append(n)
        return survived

    assert run(main) == [3, 5]


def test_r10_what_cannot_be_written_under_the_truth_is_one() -> None:
    async def main() -> None:
        model = Cannot(document=0)
        async with opened(model=model, retriever=FakeRetriever(documents=1)) as pipeline:
            with pytest.raises(ModelFailed, match="cannot read this"):
                await pipeline.complete(PROMPT)
            assert not pipeline.live_sessions and model.refused == 1

    run(main)


class Together(VirtualWorker):
    """Notes whom each call is for. The first one for three sessions raises while `meanwhile` happens, and so does the
    `unlucky`-th of those that follow it."""

    def __init__(self, name: str) -> None:
        super().__init__(name, lambda name: 0.1, self._raise)
        self.batches: list[list[Any]] = []
        self.shared = 0
        self.armed = False
        self.unlucky = 0
        self.meanwhile: Callable[[], object] = lambda: None
        self.error: Exception = ModelFailed("shared") if name == "model" else RetrieverFailed("shared")

    async def call(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        given: Any = arguments
        self.batches += given
        return await super().call(work, *arguments)

    def _raise(self, name: str) -> None:
        if self.armed and not self.shared and len(self.batches[-1]) == 3:
            self.shared = len(self.batches)
            self.meanwhile()
            raise self.error
        if self.shared and len(self.batches) == self.shared + self.unlucky:
            raise RetrieverFailed("own")

    @property
    def repeated(self) -> list[Any]:
        """Of the work of the call that raised, all for which there was a call of its own afterwards."""
        alone = [batch[0] for batch in self.batches[self.shared :] if len(batch) == 1]
        return [work for work in self.batches[self.shared - 1] if sum(work is other for other in alone) == 1]


async def four(worker: Together) -> tuple[list[Answer], list[str]]:
    """Four sessions, three of which move in step and share their calls: answers, and what became of the others."""
    answers, failed = list[Answer](), list[str]()
    model = FakeModel(ends=False)
    model.max_batch = 8

    async def one(prompt: str) -> None:
        try:
            answers.append(await exact(pipeline, prompt))
        except (RetrieverFailed, DeadlineExceeded, Cancelled) as error:
            failed.append(str(error))

    workers = Workers(model=0.1, index=0.1, encoder=0.1, prefetch=0.1)
    pipeline = opened(
        model=model,
        worker=lambda name, threads: worker if name == worker.name else workers(name, threads),
        speculation=Synchronous(speculation_stride=2),
    )
    async with pipeline:
        async with anyio.create_task_group() as callers:
            for prompt in ("3 1 4", "2 7 1", "5 3 5", "1 6 1"):
                callers.start_soon(one, prompt)
        await exact(pipeline)
        assert pipeline.ready
    return answers, failed


def counted(answers: list[Answer]) -> list[tuple[int, ...]]:
    return sorted((a.statistics.kb_calls, a.statistics.kb_queries, a.statistics.rollbacks) for a in answers)


SHARED = ["encoder", "model", "index", "prefetch"]


@pytest.mark.parametrize("stage", SHARED)
def test_r10_a_shared_call_that_raises_is_repeated_for_each_alone(stage: str) -> None:
    """Nobody fails, all outputs are right, and no section has run twice: the same searches and rollbacks as ever."""
    calm, hit = Together(stage), Together(stage)
    hit.armed = True
    (usual, _), (answers, failed) = run(four, calm), run(four, hit)
    assert hit.shared and len(hit.repeated) == 3 and not failed
    assert stage == "prefetch" or counted(answers) == counted(usual)
    waits = hit.log[hit.shared : hit.shared + 3]
    assert [end - start for start, end in waits] == pytest.approx([0.1] * 3), "that is what it costs"


@pytest.mark.parametrize("stage", SHARED)
@pytest.mark.parametrize("unlucky", [1, 2, 3])
def test_r10_only_who_fails_alone_fails(stage: str, unlucky: int) -> None:
    """Wherever it stands in the batch; what is prefetched feeds guesses only, and costs nobody more than those."""
    worker = Together(stage)
    worker.armed, worker.unlucky = True, unlucky
    answers, failed = run(four, worker)
    assert len(worker.repeated) == 3 and failed == ([] if stage == "prefetch" else ["own"])
    assert len(answers) == 4 - len(failed)


@pytest.mark.parametrize("stage", SHARED)
def test_r10_whoever_is_not_there_any_more_is_left_out(stage: str) -> None:
    """One member of the call that raises is cancelled meanwhile: it gets none of its own, and the others do."""
    worker = Together(stage)
    worker.armed = True
    streams: list[SessionStream] = []
    entering = SessionStream.__aenter__

    async def noted(self: SessionStream) -> SessionStream:
        streams.append(self)
        return await entering(self)

    worker.meanwhile = lambda: streams[2].cancel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SessionStream, "__aenter__", noted)
        answers, failed = run(four, worker)
    assert worker.shared and len(worker.repeated) == 2
    assert len(answers) == 3 and len(failed) == 1


def test_r10_a_deadline_that_passes_while_others_are_repeated_is_kept() -> None:
    """Its session gets no call of its own then, not even where the loop was busy when the deadline came."""

    async def scenario(deadline: float) -> None:
        class OneAtATime(FakeRetriever):
            def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
                if len(queries) > 1:
                    raise RetrieverFailed("shared")
                return super().search(queries, k)

        async def late() -> None:
            with pytest.raises(DeadlineExceeded):
                await pipeline.complete("5 3 5", deadline_s=deadline - 0.01)
            assert deadline <= anyio.current_time() < deadline + 0.01

        def busy() -> None:
            loop.clock.now += 0.02

        retriever, workers = OneAtATime(documents=40, seed=1, spread=4), Workers(model=0.1, index=1.0)
        pipeline = opened(retriever=retriever, speculation=Sequential(), worker=workers)
        loop: Any = asyncio.get_running_loop()
        loop.call_at(2.99, busy)
        async with pipeline, anyio.create_task_group() as callers:
            callers.start_soon(exact, pipeline, PROMPT, 2)
            await anyio.sleep(0.01)
            callers.start_soon(exact, pipeline, "2 7 1", 2)  # these two share the second search, from 1 s on
            callers.start_soon(late)
        assert [begun for begun, _ in workers["index"].log] == pytest.approx([0, 1, 2])

    run(scenario, 2.5)  # it waits for its own while that of the other runs, from 2 to 3 s
    run(scenario, 3.005)


def test_r10_of_a_call_that_is_lost_nothing_is_repeated() -> None:
    """Its thread still runs it: whoever called again would wait for that thread."""
    worker = Together("index")
    worker.armed, worker.error = True, WorkerLost("hangs")
    with pytest.raises(ExceptionGroup) as death:
        run(four, worker)
    assert death.group_contains(EngineDead, match="hangs")
    assert worker.shared == len(worker.batches)


def test_r10_what_is_repeated_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    worker = Together("index")
    worker.armed, worker.unlucky = True, 2
    run(four, worker)
    (said,) = caplog.messages
    assert "3 sessions" in said and "RetrieverFailed: shared" in said


@pytest.mark.parametrize("dying", ["Lookup", "Generate", "Verify", "Prefetch", "output"])
@pytest.mark.parametrize("empty_handed", [False, True], ids=["with turns", "without"])
def test_r10_a_dead_stage_fails_all(dying: str, empty_handed: bool) -> None:
    """Every reader is told, nobody is let in, leaving says why; whether turns died with the stage or not."""
    stage = next((stage for stage in STAGES if stage.__name__ == dying), None)
    with deadly(stage, 4, empty_handed) if stage else nullcontext():
        run(one_death, [] if stage else [Mortal()])


async def one_death(output: list[Any]) -> None:
    told = 0

    async def fail(prompt: str) -> None:
        nonlocal told
        with pytest.raises(EngineDead, match="deadly"):
            await pipeline.complete(prompt, max_new_tokens=400)
        told += 1

    pipeline = opened(output=output)
    with pytest.raises(EngineDead, match="deadly") as death:
        async with pipeline:
            async with anyio.create_task_group() as callers:
                for prompt in ("3 1 4", "2 7 1 8", "5 3 5"):
                    callers.start_soon(fail, prompt)
            assert told == 3 and not pipeline.ready
            assert anyio.current_time() < 5
            with pytest.raises(EngineDead):
                await pipeline.complete(PROMPT)
    assert isinstance(death.value.__cause__, Bad)
    assert not pipeline.live_sessions


def test_r10_readers_are_told_of_a_death_at_once() -> None:
    """Also the one whose pass is running and takes a minute; only leaving waits for that."""

    async def scenario() -> None:
        told: list[float] = []

        async def fail(prompt: str) -> None:
            with pytest.raises(EngineDead, match="deadly"):
                await pipeline.complete(prompt)
            told.append(anyio.current_time())

        pipeline = opened(worker=fixed(model=60.0, index=0.25))
        with pytest.raises(EngineDead, match="deadly"):
            async with pipeline, anyio.create_task_group() as callers:
                callers.start_soon(fail, PROMPT)
                await anyio.sleep(1)
                callers.start_soon(fail, "2 7")
        assert len(told) == 2 and max(told) < 2
        assert anyio.current_time() == pytest.approx(60.25)

    with deadly(Verify, 4, False):
        run(scenario)


class Panic(BaseException):
    """Not an `Exception`: what a crash in a native library may raise."""


@pytest.mark.parametrize("where", ["encoder", "model", "index", "prefetch"])
def test_r10_a_panic_is_a_death(where: str) -> None:
    run(one_panic, where)


async def one_panic(where: str) -> None:
    workers = Workers(model=0.1, index=0.25, encoder=0.02, prefetch=0.01)
    ends: list[tuple[BaseException, float]] = []

    def panic(name: str) -> None:
        raise Panic("deadly")

    async def ask(prompt: str) -> None:
        try:
            await pipeline.complete(prompt, max_new_tokens=400)
        except Exception as error:
            ends.append((error, anyio.current_time()))

    pipeline = opened(worker=workers)
    with pytest.raises((EngineDead, BaseExceptionGroup), match="deadly|unhandled"):
        async with pipeline:
            readers = [asyncio.create_task(ask(prompt)) for prompt in ("3 1 4", "2 7 1 8", "5 3 5")]
            await anyio.sleep(1)
            workers[where].fault = panic
            await anyio.sleep(5)
    await asyncio.wait(readers)
    assert anyio.current_time() < 7, "leaving waits for calls that cannot come home"
    assert [type(error) for error, _ in ends] == [EngineDead] * 3 and max(at for _, at in ends) < 2
    assert not pipeline.live_sessions


class Mortal(Lingers):
    """An output stage that raises after a second."""

    async def run(self, inbox: Any, outbox: Any) -> None:
        with anyio.move_on_after(1):
            await super().run(inbox, outbox)
        raise Bad("deadly")


class Rude(RetrieverFailed):
    """An error that cannot be made again from its arguments; a user's retriever may raise such a one."""

    def __init__(self, what: str, *, code: int) -> None:
        super().__init__(f"{what} ({code})")


def test_r10_whatever_a_call_raises_is_no_death() -> None:
    async def scenario() -> None:
        workers = Workers(model=0.1, index=0.1)
        async with opened(worker=workers) as pipeline:
            for error in (Rude("rude", code=3), KeyError("rude"), ExceptionGroup("rude", [ValueError()])):

                def fault(name: str, error: Exception = error) -> None:
                    raise error

                workers["index"].fault = fault
                with pytest.raises(type(error), match="rude"):
                    await pipeline.complete(PROMPT)
                workers["index"].fault = lambda name: None
                await exact(pipeline)

    run(scenario)
