"""Inside an asyncio service: one pipeline for the program's life, many requests at once, each with an end of its own.

    python examples/embed_asyncio.py
    python examples/embed_asyncio.py --max-new-tokens 64 --deadline 5

Four clients on three slots: one is answered, one meets its deadline, one goes away in the middle, and one is refused
and comes back.
Needs: pip install "ralmspec[demo]". The data are the repository's own, in examples/demo.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ralmspec.pipeline import Committed, DeadlineExceeded, Limits, Overloaded, Pipeline
from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.encoder import SentenceEncoder
from ralmspec.retrievers.passages import Passages
from ralmspec.stages.transformers_model import TransformersModel

Write = Callable[[str], object]
DEMO = Path(__file__).parent / "demo"
QUESTIONS = (
    "when was the first nuclear power plant opened",
    "what languages are spoken in india the most",
    "when was coffee first made into a drink",
    "how did the dominican republic get its name",
)


async def reply(
    pipeline: Pipeline, question: str, length: int, deadline_s: float = 60.0, write: Write | None = None
) -> str:
    """Serve one request; `write` gets text as it is committed. Cancelling this frees all that the request holds."""
    written: list[str] = []
    try:
        async with pipeline.session(question, max_new_tokens=length, deadline_s=deadline_s) as session:
            async for event in session:
                if isinstance(event, Committed):
                    written.append(event.text)
                    if write:
                        write(event.text)
    except DeadlineExceeded:  # what was committed before is final, and worth showing
        return f"late, after {''.join(written)!r}"
    return f"answered {''.join(written)!r}"


async def persist(pipeline: Pipeline, question: str, length: int, patience_s: float = 60.0) -> tuple[int, str]:
    """A client that comes back until its patience is at an end: how often it was refused, and what it got."""
    refused = 0
    try:
        async with asyncio.timeout(patience_s):
            while True:
                try:
                    return refused, await reply(pipeline, question, length)
                except Overloaded as refusal:
                    refused += 1
                    await asyncio.sleep(refusal.retry_after_s)
    except TimeoutError:
        return refused, "hung up"


async def serve(pipeline: Pipeline, length: int, deadline_s: float) -> list[str]:
    """Four clients at once, and what happened to each."""
    async with asyncio.TaskGroup() as tasks:
        calm = tasks.create_task(reply(pipeline, QUESTIONS[0], length))
        late = tasks.create_task(reply(pipeline, QUESTIONS[1], length, deadline_s=deadline_s))
        # A web framework cancels the task of a request whose client is gone; this client goes after its first text.
        gone = tasks.create_task(reply(pipeline, QUESTIONS[2], length, write=lambda text: gone.cancel()))
        back = tasks.create_task(persist(pipeline, QUESTIONS[3], length))
    refused, answer = back.result()
    last = "cancelled" if gone.cancelled() else gone.result()
    return [calm.result(), late.result(), last, f"refusals: {refused}, then {answer}"]


def load() -> Pipeline:
    """All that takes long and needs no event loop."""
    corpus = Corpus.find(DEMO)
    retriever = ExactDense(Passages(corpus.passages), corpus.embeddings, SentenceEncoder("minilm"))
    limits = Limits(sessions=3, waiting=0)  # nobody waits, so that one of the four clients has to come back
    return Pipeline(model=TransformersModel.load(DEMO / "model"), retriever=retriever, limits=limits)


async def service(length: int, deadline_s: float) -> None:
    """Open once, serve, and see that nothing is left."""
    loaded = await asyncio.to_thread(load)  # seconds, in which the program's other tasks go on
    async with loaded as pipeline:
        for what in await serve(pipeline, length, deadline_s):
            print(what)
    print(f"sessions left: {pipeline.live_sessions}")


def main(
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that each client asks for.")] = 48,
    deadline: Annotated[float, typer.Option(help="Seconds that the second client's request may take.")] = 0.3,
) -> None:
    """Serve four clients at once."""
    asyncio.run(service(max_new_tokens, deadline))


if __name__ == "__main__":
    typer.run(main)
