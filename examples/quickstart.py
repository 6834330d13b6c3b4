"""The shortest useful program: load a model and an index, open a pipeline, and stream one answer with its documents.

    python examples/quickstart.py
    python examples/quickstart.py "who plays hannibal in silence of the lambs" --max-new-tokens 64

Needs: pip install "ralmspec[demo]". The data are the repository's own, in examples/demo.
"""

from pathlib import Path
from typing import Annotated

import anyio
import typer

from ralmspec.pipeline import Committed, Done, Pipeline
from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.encoder import SentenceEncoder
from ralmspec.retrievers.passages import Passages
from ralmspec.stages.transformers_model import TransformersModel

DEMO = Path(__file__).parent / "demo"


async def answer(question: str, max_new_tokens: int) -> None:
    """Print text as it is committed, each step with the document it was written under."""
    corpus = Corpus.find(DEMO)
    retriever = ExactDense(Passages(corpus.passages), corpus.embeddings, SentenceEncoder("minilm"))
    model = TransformersModel.load(DEMO / "model")
    async with (
        Pipeline(model=model, retriever=retriever) as pipeline,
        pipeline.session(question, max_new_tokens=max_new_tokens) as session,
    ):
        async for event in session:
            match event:
                case Committed(text=text, document=document):
                    print(f"{text!r:40} [{document.id}] {document.title}, score {document.score:.3f}")
                case Done(statistics=s):
                    print(
                        f"{s.new_tokens} tokens in {s.latency_s:.2f} s, the first after {s.time_to_first_token_s:.2f} s"
                    )
                    print(f"{s.steps} steps, {s.kb_calls} searches, {s.matched} of {s.checked} guesses right")


def main(
    question: Annotated[str, typer.Argument(help="What to ask.")] = "when was the first nuclear power plant opened",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 48,
) -> None:
    """Answer one question over the bundled passages."""
    anyio.run(answer, question, max_new_tokens)


if __name__ == "__main__":
    typer.run(main)
