"""PaddedDense: as costly as a larger corpus, with the results of the real one or an error."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ralmspec.retrievers import padded
from ralmspec.retrievers.base import Document, Query
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.errors import BadKnowledge
from ralmspec.retrievers.padded import PaddedDense, with_distractors
from ralmspec.retrievers.vectors import Kind, Vectors, narrow

if importlib.util.find_spec("faiss") is None:
    pytest.skip("needs faiss (the extra 'local')", allow_module_level=True)

ENCODER: Any = SimpleNamespace(dimension=32)
PASSAGES = [Document(i, "", str(i)) for i in range(300)]


@pytest.fixture
def vectors() -> NDArray[np.float32]:
    """Unit vectors in a few bundles, as passages of the same article are."""
    random = np.random.default_rng(3)
    bundles = random.standard_normal((15, 32)).repeat(20, axis=0)
    raw = bundles + 0.3 * random.standard_normal((300, 32))
    unit: NDArray[np.float32] = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)
    return unit


def test_results_are_those_of_the_real_corpus(vectors: NDArray[np.float32]) -> None:
    plain, wide = ExactDense(PASSAGES, vectors, ENCODER), PaddedDense(PASSAGES, vectors, ENCODER, pad_to=5000)
    queries = [Query(text="q", vector=vector) for vector in vectors[::20]]
    for expected, found in zip(plain.search(queries, 5), wide.search(queries, 5), strict=True):
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.scores.tobytes() == expected.scores.tobytes()
    assert len(wide) == 300
    assert wide.document(299).text == "299"


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_vectors_of_half_precision_can_be_padded(vectors: NDArray[np.float32], kind: Kind) -> None:
    stored = Vectors.open(narrow(vectors, kind))
    queries = [Query(text="q", vector=vector) for vector in vectors[::20]]
    plain, wide = ExactDense(PASSAGES, stored, ENCODER), PaddedDense(PASSAGES, stored, ENCODER, pad_to=5000, threads=2)
    for expected, found in zip(plain.search(queries, 5), wide.search(queries, 5), strict=True):
        assert found.ids.tolist() == expected.ids.tolist()
        assert found.scores.tobytes() == expected.scores.tobytes()


def test_the_scan_covers_the_distractors_and_reports_say_so(vectors: NDArray[np.float32]) -> None:
    wide = PaddedDense(PASSAGES, vectors, ENCODER, pad_to=5000)
    assert wide._vectors.stored.shape == (5000, 32)
    assert "5,000 x 32" in wide.description
    assert "4,700 are distractors" in wide.description


def test_a_distractor_among_the_results_is_an_error(vectors: NDArray[np.float32]) -> None:
    queries = [Query(text="who?", vector=vectors[0])]
    with pytest.raises(BadKnowledge, match=r"a distractor came \d+ of 100 for the query 'who\?'.*smaller than 0.9"):
        PaddedDense(PASSAGES, vectors, ENCODER, pad_to=5000, norm=0.9).search(queries, 100)


def test_distractors_are_near_passages_short_and_the_same_for_a_seed(
    vectors: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padded, "_CHUNK", 128)  # several chunks
    wide = with_distractors(vectors, 1000, noise=0.5, norm=0.4, seed=7)
    assert wide.dtype == np.float32
    assert wide[:300].tobytes() == vectors.tobytes()
    extra = wide[300:]
    assert np.linalg.norm(extra, axis=1) == pytest.approx(0.4, rel=1e-5)
    assert len(np.unique(extra, axis=0)) == 700
    nearest = (extra / 0.4 @ vectors.T).max(axis=1)
    assert nearest.min() > 0.7  # noise of half a passage's length: cosine about 0.9
    assert np.array_equal(wide, with_distractors(vectors, 1000, noise=0.5, norm=0.4, seed=7))
    assert not np.array_equal(wide, with_distractors(vectors, 1000, noise=0.5, norm=0.4, seed=8))


def test_padding_is_for_the_inner_product(vectors: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="inner product only"):
        PaddedDense(PASSAGES, Vectors.open(vectors, metric="squared L2"), ENCODER, pad_to=5000)


def test_cannot_pad_to_less_than_there_is(vectors: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="cannot pad 300 passages to 299"):
        PaddedDense(PASSAGES, vectors, ENCODER, pad_to=299)
    plain = PaddedDense(PASSAGES, vectors, ENCODER, pad_to=300)
    assert plain.search([Query(text="q", vector=vectors[7])], 1)[0].ids.tolist() == [7]
