"""What many tests of the pipeline need: one over fakes, an answer compared with the oracle, and time that passes."""

from collections.abc import Callable, Sequence
from typing import Any

import anyio
from fakes import FakeModel, FakeRetriever, fixed
from oracle import sequential

from ralmspec.pipeline import (
    Answer,
    Arrangement,
    Asynchronous,
    Event,
    Inbox,
    InContext,
    Limits,
    Outbox,
    Pipeline,
    SessionStream,
)
from ralmspec.stages.session import Session

PROMPT = "3 1 4"
TOKENS = 12


def opened(
    *,
    model: Any = None,
    retriever: Any = None,
    speculation: Arrangement | None = None,
    limits: Limits | None = None,
    worker: Any = None,
    output: Sequence[Any] = (),
) -> Pipeline:
    """A pipeline over fakes, two tokens a step."""
    return Pipeline(
        model=model or FakeModel(ends=False),
        retriever=retriever or FakeRetriever(documents=40, seed=1, spread=4),
        workload=InContext(retrieval_stride=2),
        speculation=speculation or Asynchronous(speculation_stride=3),
        limits=limits or Limits(),
        worker=worker or fixed(model=0.1, index=0.25, encoder=0.02, prefetch=0.01),
        output=output,
    )


def expected(pipeline: Pipeline, prompt: str = PROMPT, max_new_tokens: int = TOKENS) -> list[int]:
    """What the oracle says."""
    model, retriever = pipeline.model, pipeline.retriever
    return sequential(model, retriever, model.encode(prompt), max_new_tokens=max_new_tokens, retrieval_stride=2)[0]


async def exact(pipeline: Pipeline, prompt: str = PROMPT, max_new_tokens: int = TOKENS) -> Answer:
    """Serve one session, and compare with the oracle."""
    answer = await pipeline.complete(prompt, max_new_tokens=max_new_tokens)
    assert list(answer.tokens) == expected(pipeline, prompt, max_new_tokens)
    return answer


async def until(condition: Callable[[], object]) -> None:
    """Let time pass, in hundredths of a second, until it holds; at most five minutes."""
    with anyio.fail_after(300):
        while not condition():  # noqa: ASYNC110 (virtual time, and nothing announces all the things waited for)
            await anyio.sleep(0.01)


def state(stream: SessionStream) -> Session:
    """The session behind a stream that was entered; what no caller sees."""
    return stream._sink.session


def waiting(stream: SessionStream) -> int:
    """Events that wait for the stream's reader."""
    return len(stream._sink.events)


class Lingers:
    """An output stage that keeps every event for a while, and remembers it."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.events: list[Event] = []

    async def run(self, inbox: Inbox[Event], outbox: Outbox[Event]) -> None:
        async for event in inbox:
            self.events.append(event)
            await anyio.sleep(self.seconds)
            await outbox.send(event)
