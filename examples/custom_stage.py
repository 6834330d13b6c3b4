"""A stage of one's own on the way of the output: numbered citations in the text, and the list of sources at its end.

    python examples/custom_stage.py
    python examples/custom_stage.py "who plays hannibal in silence of the lambs" --max-new-tokens 64

Needs: pip install "ralmspec[demo]". The data are the repository's own, in examples/demo.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import anyio
import typer

from ralmspec.pipeline import Committed, Done, Event, Inbox, Outbox, Pipeline
from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.encoder import SentenceEncoder
from ralmspec.retrievers.passages import Passages
from ralmspec.stages.transformers_model import TransformersModel

DEMO = Path(__file__).parent / "demo"


@dataclass(slots=True)
class Cited:
    """What one session has cited, (number, title) by document id, and its newest step."""

    numbers: dict[int, tuple[int, str]] = field(default_factory=dict)
    newest: Committed | None = None


class Citations:
    """Marks where text begins to come from another document, and lists the documents before the session's end.

    One instance serves all sessions of one pipeline, whose events arrive mixed. So what it knows is kept by session
    id, and dropped at `Done`, which every session has, however it ends.
    """

    def __init__(self) -> None:
        self.open: dict[int, Cited] = {}

    async def run(self, inbox: Inbox[Event], outbox: Outbox[Event]) -> None:
        """Pass on what `cite` makes of each event, until the inbox ends."""
        async for event in inbox:
            for cited in self.cite(event):
                await outbox.send(cited)

    def cite(self, event: Event) -> Iterator[Event]:
        """The event, with a marker where its document is new; before a good `Done` also the list of sources."""
        match event:
            case Committed(document=document):
                cited = self.open.setdefault(event.session, Cited())
                before, cited.newest = cited.newest, event
                number, _ = cited.numbers.setdefault(document.id, (len(cited.numbers) + 1, document.title))
                if before is None or before.document.id != document.id:
                    head, space, tail = event.text.partition(" ")  # steps may begin inside a word
                    event = replace(event, text=f"{head} [{number}]{space}{tail}")
            case Done(error=None):
                cited = self.open.pop(event.session, Cited())
                if cited.newest is not None:
                    lines = [f"[{number}] {title} (passage {id})" for id, (number, title) in cited.numbers.items()]
                    yield replace(cited.newest, text="\n\n" + "\n".join(lines), tokens=())
            case Done():
                self.open.pop(event.session, None)
        yield event


async def answer(question: str, max_new_tokens: int) -> None:
    """Print the answer as it comes; the caller sees one stream of text, sources included."""
    corpus = Corpus.find(DEMO)
    retriever = ExactDense(Passages(corpus.passages), corpus.embeddings, SentenceEncoder("minilm"))
    model = TransformersModel.load(DEMO / "model")
    async with (
        Pipeline(model=model, retriever=retriever, output=[Citations()]) as pipeline,
        pipeline.session(question, max_new_tokens=max_new_tokens) as session,
    ):
        async for event in session:
            if isinstance(event, Committed):
                print(event.text, end="", flush=True)
    print()


def main(
    question: Annotated[str, typer.Argument(help="What to ask.")] = "when was the first nuclear power plant opened",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 48,
) -> None:
    """Answer one question, with citations."""
    anyio.run(answer, question, max_new_tokens)


if __name__ == "__main__":
    typer.run(main)
