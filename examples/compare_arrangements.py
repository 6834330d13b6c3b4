"""The same requests served sequentially and with speculation: the same tokens, sooner.

    python examples/compare_arrangements.py
    python examples/compare_arrangements.py --questions 6 --max-new-tokens 128 --latency 0.1

The bundled index is so small that a search costs nothing, so each is given a set time, as if the index ran on a machine
of its own: a simulation, and the table says so. `ralmspec compare` measures more, with intervals and bounds.
Needs: pip install "ralmspec[demo]". The data are the repository's own, in examples/demo.
"""

from pathlib import Path
from typing import Annotated

import anyio
import typer
from rich.console import Console
from rich.table import Table

from ralmspec.pipeline import Answer, Pipeline, published
from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.encoder import SentenceEncoder
from ralmspec.retrievers.latency import SetLatency
from ralmspec.retrievers.passages import Passages
from ralmspec.retrievers.questions import QuestionFolder
from ralmspec.stages.transformers_model import TransformersModel

DEMO = Path(__file__).parent / "demo"
NAMES = ("RaLMSeq", "RaLMSpec", "+PSA")  # of those in `published`


async def compare(questions: int, max_new_tokens: int, latency: float) -> Table:
    """Every question under every arrangement in turn; raises `SystemExit` if a single token differs."""
    corpus = Corpus.find(DEMO)
    index = ExactDense(Passages(corpus.passages), corpus.embeddings, SentenceEncoder("minilm"))
    retriever = SetLatency(index, latency)
    model = TransformersModel.load(DEMO / "model")
    asked = QuestionFolder(DEMO).read("nq")[:questions]

    answers: dict[str, list[Answer]] = {name: [] for name in NAMES}
    for question in (asked[0], *asked):  # the first one twice: it warms everything up
        for name in NAMES:
            async with Pipeline(model=model, retriever=retriever, speculation=published()[name]) as pipeline:
                # `ignore_eos`: outputs of equal length, or the comparison would be of lengths
                answer = await pipeline.complete(question.question, max_new_tokens=max_new_tokens, ignore_eos=True)
            answers[name].append(answer)

    reference = answers["RaLMSeq"][1:]
    sequential = sum(answer.statistics.latency_s for answer in reference)
    table = Table(title=f"{len(asked)} questions, {max_new_tokens} tokens each; {latency:g} s a search, simulated")
    for heading in ("arrangement", "s a question", "speed-up", "searches", "rollbacks", "identical"):
        table.add_column(heading, justify="left" if heading == "arrangement" else "right")
    for name in NAMES:
        measured = answers[name][1:]
        took = [answer.statistics for answer in measured]
        seconds = sum(s.latency_s for s in took)
        identical = sum(mine.tokens == its.tokens for mine, its in zip(measured, reference, strict=True))
        if identical != len(asked):
            # In float32 two almost equal logits may change places; load the model with dtype="float64" to exclude it.
            raise SystemExit(f"{name}: {len(asked) - identical} of {len(asked)} outputs are not those of RaLMSeq")
        table.add_row(
            name,
            f"{seconds / len(asked):.2f}",
            f"{sequential / seconds:.2f}x",
            str(sum(s.kb_calls for s in took)),
            str(sum(s.rollbacks for s in took)),
            f"{identical}/{len(asked)}",
        )
    return table


def main(
    questions: Annotated[int, typer.Option(min=1, help="How many of the bundled questions.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each.")] = 64,
    latency: Annotated[float, typer.Option(min=0.0, help="Seconds that a search takes.")] = 0.3,
) -> None:
    """Compare RaLMSeq, RaLMSpec and RaLMSpec+PSA on a few questions."""
    Console().print(anyio.run(compare, questions, max_new_tokens, latency))


if __name__ == "__main__":
    typer.run(main)
