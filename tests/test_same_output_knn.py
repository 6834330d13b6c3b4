"""The oracle of KNN-LM on the bundled model and text: a real datastore, searched exactly and approximately.

The pipeline's model reuses keys and values; the oracle's is a second copy whose memory is wiped after every pass.
float64, so equality is strict.
"""

import gzip
import json
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs ralmspec[local]")
pytest.importorskip("faiss", reason="needs ralmspec[local]")

from oracle import sequential_knn
from test_same_output_real import DEMO, Forgetful

from ralmspec.pipeline import OS3, Arrangement, Asynchronous, Continuous, KnnLM, Pipeline, Sampling, Synchronous
from ralmspec.retrievers.datastore import KINDS, Datastore
from ralmspec.retrievers.datastore_build import DatastoreOptions, build_datastore
from ralmspec.retrievers.index import SearchOptions
from ralmspec.stages.transformers_model import TransformersModel

ARRANGEMENTS: list[Arrangement] = [
    Synchronous(speculation_stride=1, prefetch=1),
    Synchronous(speculation_stride=OS3(), prefetch=20),
    Asynchronous(speculation_stride=8, prefetch=64),
    Continuous(window=12, prefetch=64),
]
PROMPTS = ("The river runs through the old town, and", "In 1914 he was elected to the")


@pytest.fixture(scope="module")
def models() -> tuple[TransformersModel, TransformersModel]:
    return TransformersModel.load(DEMO / "model", dtype="float64"), Forgetful.load(DEMO / "model", dtype="float64")


@pytest.fixture(scope="module")
def datastore(models: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    folder = tmp_path_factory.mktemp("knn")
    text = folder / "text.txt"
    with gzip.open(DEMO / "passages_wikipedia.jsonl.gz", "rt") as lines:
        text.write_text("\n".join(json.loads(line)["text"] for _, line in zip(range(40), lines, strict=False)))
    options = DatastoreOptions(kinds=KINDS, window=256, context=64, hnsw_m=8, hnsw_ef_construction=60)
    build_datastore([text], folder / "store", models[0], options)
    return Datastore.open(folder / "store", decode=models[0].decode)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 1024])
async def test_every_arrangement_gives_the_oracles_tokens(
    kind: str, top_k: int, models: tuple[TransformersModel, TransformersModel], datastore: Datastore
) -> None:
    model, oracle = models
    search = SearchOptions(ef_search=1024, depth=1024, probes=8)
    retriever = datastore.retriever(kind, search)
    workload = KnnLM(datastore=datastore, top_k=top_k, interpolation=0.4, temperature=20.0, max_prompt_tokens=64)
    expected = {}
    for prompt, sampling in zip(PROMPTS, (Sampling(), Sampling(temperature=0.8, seed=5)), strict=True):
        expected[prompt, sampling] = sequential_knn(
            oracle, retriever, workload, model.encode(prompt), max_new_tokens=12, sampling=sampling
        )
    misses = 0
    for arrangement in ARRANGEMENTS:
        async with Pipeline(model=model, retriever=retriever, workload=workload, speculation=arrangement) as pipeline:
            for (prompt, sampling), (tokens, nearest) in expected.items():
                answer = await pipeline.complete(prompt, max_new_tokens=12, sampling=sampling)
                assert list(answer.tokens) == tokens
                assert [step.document.id for step in answer.steps] == nearest
                misses += answer.statistics.rollbacks
    assert misses, "some guesses were wrong"


def test_a_document_is_the_text_around_its_entry(datastore: Datastore, models: tuple[Any, Any]) -> None:
    entry = datastore.retriever().document(100)
    before, _, value = entry.text.rpartition(" → ")
    assert models[0].decode([int(datastore.values[100])]) == value
    assert before == models[0].decode(datastore.tokens[69:101].tolist()) and entry.title == "entry 100"
