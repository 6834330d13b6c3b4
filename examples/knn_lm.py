"""KNN-LM: build a small datastore from the bundled passages, then go on from a prompt, asking it at every token.

    python examples/knn_lm.py
    python examples/knn_lm.py "The river runs through" --passages 100 --max-new-tokens 32

Needs: pip install "ralmspec[demo]". The data are the repository's own, in examples/demo; the datastore is temporary.
"""

import gzip
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Annotated

import anyio
import typer

from ralmspec.pipeline import Committed, Continuous, Done, KnnLM, Limits, Pipeline
from ralmspec.retrievers.datastore import Datastore
from ralmspec.retrievers.datastore_build import DatastoreOptions, build_datastore
from ralmspec.stages.transformers_model import TransformersModel

DEMO = Path(__file__).parent / "demo"


def built(model: TransformersModel, passages: int, work: Path) -> Datastore:
    """A datastore with an entry for every token of the first passages."""
    text = work / "text.txt"
    with gzip.open(DEMO / "passages_wikipedia.jsonl.gz", "rt", encoding="utf-8") as lines:
        text.write_text("\n".join(json.loads(line)["text"] for line in islice(lines, passages)), encoding="utf-8")
    build_datastore([text], work / "store", model, DatastoreOptions())
    return Datastore.open(work / "store", decode=model.decode)


async def go_on(prompt: str, passages: int, max_new_tokens: int) -> None:
    """Print each token as it is committed, with the text of the entry nearest to where it was chosen."""
    model = TransformersModel.load(DEMO / "model")
    with tempfile.TemporaryDirectory() as work:
        datastore = built(model, passages, Path(work))
        retriever = datastore.retriever("exact")
        print(f"{len(datastore):,} entries")
        async with (
            Pipeline(
                model=model,
                retriever=retriever,
                workload=KnnLM(datastore=datastore, top_k=16, interpolation=0.3, temperature=8.0),
                speculation=Continuous(prefetch=64),
                limits=Limits(cached_documents=8192),
            ) as pipeline,
            pipeline.session(prompt, max_new_tokens=max_new_tokens) as session,
        ):
            async for event in session:
                match event:
                    case Committed(text=text, document=document):
                        context = retriever.document(document.id).text.replace("\n", " ")
                        print(f"{text!r:16} squared distance {-document.score:6.1f}  ...{context[-60:]}")
                    case Done(statistics=s):
                        print(f"{s.new_tokens} tokens in {s.latency_s:.2f} s, {s.kb_calls} searches")
                        print(f"{s.matched} of {s.checked} guesses gave the right token")


def main(
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")] = "The city lies on the river",
    passages: Annotated[int, typer.Option(min=10, help="Passages in the datastore, about 150 entries each.")] = 60,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 24,
) -> None:
    """Go on from a prompt with KNN-LM over bundled passages."""
    anyio.run(go_on, prompt, passages, max_new_tokens)


if __name__ == "__main__":
    typer.run(main)
