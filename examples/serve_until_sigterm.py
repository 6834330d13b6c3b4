"""A service that ends as it should: SIGTERM or SIGINT drains it, the same again ends it at once.

    python examples/serve_until_sigterm.py --clients 4 & sleep 20; kill -TERM $!

Clients ask one question after another. On the first signal nobody new is let in, what is being answered may be finished
within `--drain` seconds, and the rest is told that the service has closed: every stream ends with `Done` or an error. A
third signal kills the process, should a call into a native library never come back.
Needs: pip install "ralmspec[demo]". The data are the repository's own, in examples/demo.
"""

import signal
from collections import Counter
from pathlib import Path
from typing import Annotated

import anyio
import typer

from ralmspec.pipeline import Committed, Done, EngineDead, Limits, NotServing, Overloaded, Pipeline
from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.encoder import SentenceEncoder
from ralmspec.retrievers.passages import Passages
from ralmspec.stages.transformers_model import TransformersModel

DEMO = Path(__file__).parent / "demo"
QUESTIONS = (
    "when was the first nuclear power plant opened",
    "what languages are spoken in india the most",
    "when was coffee first made into a drink",
    "how did the dominican republic get its name",
)


async def client(pipeline: Pipeline, place: int, length: int, ends: Counter[str]) -> None:
    """Asks until the service closes, and says how each stream ended."""
    while True:
        tokens, end = 0, "TRUNCATED"
        try:
            async with pipeline.session(QUESTIONS[place % len(QUESTIONS)], max_new_tokens=length) as session:
                async for event in session:
                    tokens += len(event.tokens) if isinstance(event, Committed) else 0
                    end = "done" if isinstance(event, Done) else end
        except Overloaded as refusal:
            await anyio.sleep(refusal.retry_after_s)
            continue
        except (NotServing, EngineDead) as closed:
            end = type(closed).__name__
        ends[end] += 1
        print(f"client {place}: {end} after {tokens} tokens", flush=True)
        if end != "done":
            return


async def serve(closed: Pipeline, clients: int, length: int) -> Counter[str]:
    """Serve until a signal comes, then drain; how the streams ended."""
    ends: Counter[str] = Counter()
    async with anyio.create_task_group() as handlers:  # outside the pipeline's block: they outlive it by a last event
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with anyio.create_task_group() as drain:
                async with closed as pipeline:
                    for place in range(clients):
                        handlers.start_soon(client, pipeline, place, length, ends)
                    print("serving", flush=True)
                    await anext(signals)
                    print(f"draining {pipeline.live_sessions} sessions", flush=True)

                    async def leave_at_once() -> None:
                        await anext(signals)
                        drain.cancel_scope.cancel()

                    drain.start_soon(leave_at_once)
                drain.cancel_scope.cancel()
    print(f"closed; sessions left: {pipeline.live_sessions}", flush=True)
    return ends


def load(drain_s: float) -> Pipeline:
    """All that takes long and needs no event loop."""
    corpus = Corpus.find(DEMO)
    retriever = ExactDense(Passages(corpus.passages), corpus.embeddings, SentenceEncoder("minilm"))
    # A call that hangs is given up after as long as draining may take, a second at least, so that leaving ends.
    limits = Limits(drain_s=drain_s, call_s=max(drain_s, 1.0))
    return Pipeline(model=TransformersModel.load(DEMO / "model"), retriever=retriever, limits=limits)


def main(
    clients: Annotated[int, typer.Option(min=0, help="Clients that ask at the same time.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that each question is answered with.")] = 48,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for what is being answered when the signal comes.")] = 10,
) -> None:
    """Serve until SIGTERM or SIGINT."""
    anyio.run(serve, load(drain), clients, max_new_tokens)


if __name__ == "__main__":
    typer.run(main)
