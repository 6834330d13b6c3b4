"""The rules of the cycle, R8 to R12: readers, ends, faults, draining and the watchdog. See `test_rules.py`."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from clocks import run
from fakes import FakeModel, FakeRetriever, VirtualWorker, Workers, fixed
from scenes import PROMPT, TOKENS, Lingers, exact, expected, opened, until

from ralmspec.pipeline import (
    Asynchronous,
    Cancelled,
    Committed,
    DeadlineExceeded,
    Done,
    EngineDead,
    Limits,
    ModelFailed,
    NotServing,
    Overloaded,
    Pipeline,
    Ranking,
    RetrieverFailed,
    SessionStream,
    Stalled,
)
from ralmspec.stages import generate, lookup, prefetch, verify
from ralmspec.stages.session import Session, Status

# R8 The client never holds a stage -------------------------------------------------------------------------------


def test_r8_a_reader_that_stays_away_pauses_its_own_session_only() -> None:
    async def scenario(away: bool) -> float:
        model, limit = FakeModel(ends=False), 2
        speculation = Asynchronous(speculation_stride=2)
        async with opened(model=model, limits=Limits(unread_events=limit), speculation=speculation) as pipeline:
            async with pipeline.session(PROMPT, max_new_tokens=40) as session:
                assert session._sink is not None
                if away:
                    await anyio.sleep(100)
                    passes = model.passes
                    await anyio.sleep(100)
                    assert model.passes == passes, "work goes on although nobody reads"
                    assert limit <= len(session._sink.events) <= limit + speculation.window
                began = anyio.current_time()
                await exact(pipeline, "2 7 1 8")
                beside = anyio.current_time() - began
                tokens = []
                async for event in session:  # and who comes back gets everything
                    assert len(session._sink.events) <= limit + speculation.window
                    tokens += event.tokens if isinstance(event, Committed) else ()
                assert tokens == expected(pipeline, PROMPT, 40)
            return beside

    assert run(scenario, True) <= run(scenario, False)


def test_r8_one_event_at_a_time_is_enough() -> None:
    async def scenario() -> None:
        async with opened(limits=Limits(unread_events=1)) as pipeline:
            await exact(pipeline)

    run(scenario)


# R9 Exactly one end ----------------------------------------------------------------------------------------------


def test_r9_the_first_end_wins_and_is_told_once() -> None:
    async def scenario() -> None:
        passed = Lingers()
        async with opened(output=[passed], limits=Limits(unread_events=2)) as pipeline:
            async with pipeline.session(PROMPT, max_new_tokens=40, deadline_s=2) as session:
                await anyio.sleep(1)
                session.cancel()
                await anyio.sleep(2)  # the deadline passes
                session.cancel()
                assert session._session is not None
                session._session.finish(Status.FAILED, RetrieverFailed("late"))
                with pytest.raises(Cancelled):
                    async for event in session:
                        assert not isinstance(event, Done)
        assert [type(event) for event in passed.events].count(Done) == 1
        assert isinstance(passed.events[-1], Done)

    run(scenario)


@pytest.mark.parametrize("end", ["done", "cancel", "deadline", "fault", "closed"])
def test_r9_a_stream_that_was_cut_never_looks_complete(end: str) -> None:
    run(ended, end)


async def ended(end: str) -> None:
    """A session comes to this end; its reader must learn which."""
    errors = {"cancel": Cancelled, "deadline": DeadlineExceeded, "fault": ModelFailed, "closed": NotServing}
    tokens: list[int] = []

    async def read() -> None:
        async for event in session:
            assert session._session is not None
            if isinstance(event, Committed):
                tokens.extend(event.tokens)
        assert isinstance(event, Done)

    def fault(name: str) -> None:
        raise ModelFailed("no memory")

    workers = Workers(model=0.1, index=0.25)
    session: SessionStream
    async with anyio.create_task_group() as readers:
        async with opened(worker=workers, limits=Limits(drain_s=0.5)) as pipeline:
            session = pipeline.session(PROMPT, max_new_tokens=30, deadline_s=1.5 if end == "deadline" else 1000)
            await session.__aenter__()
            if end == "done":
                await read()
            else:
                readers.start_soon(raises, errors[end], read)
                await anyio.sleep(1)
                if end == "cancel":
                    session.cancel()
                elif end == "fault":
                    workers["model"].fault = fault
                if end != "closed":
                    await until(lambda: not pipeline.live_sessions)
    truth = expected(pipeline, PROMPT, 30)
    assert tokens == truth[: len(tokens)]
    assert (tokens == truth) == (end == "done")


async def raises(error: type[Exception], read: Callable[[], Any]) -> None:
    """The reader sees this error."""
    with pytest.raises(error):
        await read()


def test_r9_leaving_the_block_is_an_end() -> None:
    async def scenario() -> None:
        async with opened() as pipeline:
            async with pipeline.session(PROMPT, max_new_tokens=400) as session:
                await anext(session)
            assert session._session is not None and session._session.final
            await until(lambda: not pipeline.live_sessions)
            assert anyio.current_time() < 3, "it went on to its end"

    run(scenario)


# R10 Fault scope -------------------------------------------------------------------------------------------------


class Fragile(FakeRetriever):
    """Chokes on one session's question, in the encoder, at a score, or at a document."""

    def __init__(self, where: str) -> None:
        super().__init__(documents=40, seed=1, spread=4)
        self.where = where

    def score(self, query: Any, rows: Any) -> Any:
        if self.where == "score" and len(rows) < len(self) and query.text.startswith("9 9 9"):
            raise ValueError("score")
        return super().score(query, rows)


class FragileModel(FakeModel):
    """Reads several prefixes at once, and cannot write the text of one session."""

    max_batch = 8

    def __init__(self, where: str) -> None:
        super().__init__(ends=False)
        self.where = where

    def decode(self, tokens: Any) -> str:
        text = super().decode(tokens)
        if self.where == "query" and text.startswith("9 9 9") and len(tokens) > 5:
            raise ValueError("query")
        return text


@pytest.mark.parametrize("where", ["query", "score", "choose", "commit", "judge"])
def test_r10_one_sessions_fault_is_its_own(where: str) -> None:
    """Three sessions, always together in every batch. One of them cannot be served; the others must not notice."""
    run(one_fragile, where)


async def one_fragile(where: str) -> None:
    model, retriever = FragileModel(where), Fragile(where)
    pipeline = opened(model=model, retriever=retriever, worker=fixed(model=0.1, index=0.1, encoder=0.1))
    victim: list[int] = []

    def broken(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            session = next((a for a in arguments if isinstance(a, Session)), None)
            if victim and session is not None and session.id == victim[0] and len(session.committed) >= 2:
                raise ValueError(where)
            return method(*arguments)

        return call

    def choose(frontier: Any, retrieved: Any, position: int, sampling: Any) -> int:
        if position == 4 and sampling.seed == 99:
            raise ValueError("choose")
        return int(pipeline._workload.__class__.choose(pipeline._workload, frontier, retrieved, position, sampling))

    with pytest.MonkeyPatch.context() as patch:
        if where == "judge":
            patch.setattr(Session, "judge", broken(Session.judge))
        elif where == "commit":
            patch.setattr(Session, "_commit", broken(Session._commit))
        elif where == "choose":
            patch.setattr(pipeline._workload, "choose", choose, raising=False)
        async with pipeline, anyio.create_task_group() as callers:
            for prompt in ("3 1 4", "2 7 1 8"):
                callers.start_soon(exact, pipeline, prompt)
            from ralmspec.pipeline import Sampling

            async with pipeline.session("9 9 9", max_new_tokens=TOKENS, sampling=Sampling(seed=99)) as session:
                victim.append(session.id)
                with pytest.raises(Exception, match=where):
                    async for _ in session:
                        pass
