"""The rules of the cycle, R8 and R9: readers and ends. See `test_rules.py`."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from clocks import run
from fakes import FakeModel, Workers
from scenes import PROMPT, Lingers, exact, expected, opened, state, until, waiting

from ralmspec.pipeline import (
    Asynchronous,
    Cancelled,
    Committed,
    DeadlineExceeded,
    Done,
    Limits,
    ModelFailed,
    NotServing,
    RetrieverFailed,
    SessionStream,
)
from ralmspec.stages.request import Status

# R8 The client never holds a stage -------------------------------------------------------------------------------


def test_r8_a_reader_that_stays_away_pauses_its_own_session_only() -> None:
    async def scenario(away: bool) -> float:
        model, limit = FakeModel(ends=False), 2
        speculation = Asynchronous(speculation_stride=2)
        async with opened(model=model, limits=Limits(unread_events=limit), speculation=speculation) as pipeline:
            async with pipeline.session(PROMPT, max_new_tokens=40) as session:
                if away:
                    await anyio.sleep(100)
                    passes = model.passes
                    await anyio.sleep(100)
                    assert model.passes == passes, "work goes on although nobody reads"
                    assert limit <= waiting(session) <= limit + speculation.window
                began = anyio.current_time()
                await exact(pipeline, "2 7 1 8")
                beside = anyio.current_time() - began
                tokens: list[int] = []
                async for event in session:  # and who comes back gets everything
                    assert waiting(session) <= limit + speculation.window
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
        pipeline = opened(output=[passed], limits=Limits(unread_events=2))
        async with pipeline, pipeline.session(PROMPT, max_new_tokens=40, deadline_s=2) as session:
            await anyio.sleep(1)
            session.cancel()
            await anyio.sleep(2)  # the deadline passes
            session.cancel()
            state(session).finish(Status.FAILED, RetrieverFailed("late"))
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
            if isinstance(event, Committed):
                tokens.extend(event.tokens)
        assert isinstance(event, Done)

    def fault(name: str) -> None:
        raise ModelFailed("no memory")

    workers = Workers(model=0.1, index=0.25)
    session: SessionStream
    async with anyio.create_task_group() as readers, opened(worker=workers, limits=Limits(drain_s=0.5)) as pipeline:
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
            assert state(session).final
            await until(lambda: not pipeline.live_sessions)
            assert anyio.current_time() < 3, "it went on to its end"

    run(scenario)
