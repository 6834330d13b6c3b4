"""How high a document can score that a search left out: the bound holds, and is no higher than it must be."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRetriever

from ralmspec.pipeline import Retrying
from ralmspec.retrievers.base import Document, Query, Ranking, bound_of
from ralmspec.retrievers.drift import product_bound
from ralmspec.retrievers.flat import product_error
from ralmspec.retrievers.latency import SetLatency

DEMO = Path(__file__).parent.parent / "examples" / "demo"
Vectors = np.ndarray[Any, np.dtype[np.float32]]


# The bound of inner products ------------------------------------------------------------------------------------


def lengths(vectors: Vectors) -> Vectors:
    return np.asarray(np.linalg.norm(vectors.astype(np.float64), axis=-1))


def scores(vectors: Vectors, query: Vectors) -> Vectors:
    """In float32, in the order of the numbers: one of the roundings that a kernel may have."""
    total = np.zeros(len(vectors), dtype=np.float32)
    for column in range(vectors.shape[1]):
        total += vectors[:, column] * query[column]
    return total


@pytest.mark.parametrize("dimension", [1, 2, 3, 17, 384])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_nothing_that_was_left_out_passes_the_bound(dimension: int, scale: float) -> None:
    random = np.random.default_rng(dimension)
    for turn in (0.0, 1e-7, 0.01, 0.3, 2.0, 1e3):
        vectors = random.standard_normal((400, dimension)).astype(np.float32) * np.float32(scale)
        past = random.standard_normal(dimension).astype(np.float32)
        query = (past + turn * random.standard_normal(dimension)).astype(np.float32)
        # Some lie along the queries, where the bound is reached, and some are short.
        vectors[:50] = query * random.uniform(-1, 1, (50, 1)) * np.float32(scale)
        vectors[50:100] = past * random.uniform(-1, 1, (50, 1)) * np.float32(scale)
        vectors[100:150] *= random.uniform(0, 1, (50, 1)).astype(np.float32)
        before, asked, longest = scores(vectors, past), scores(vectors, query), float(lengths(vectors).max())
        for floor in np.quantile(before, [0.0, 0.1, 0.5, 0.9, 1.0]):
            left = asked[before <= floor]
            assert left.max() <= product_bound(query, past, float(floor), longest)


@pytest.mark.parametrize("dimension", [2, 5, 384])
def test_the_bound_is_no_higher_than_it_must_be(dimension: int) -> None:
    """The worst vector lies in the plane of both queries; here are all directions in it."""
    random, turns = np.random.default_rng(7), np.linspace(0, 2 * np.pi, 20_001)
    for _ in range(50):
        past, query = random.standard_normal((2, dimension)).astype(np.float32)
        along = past / lengths(past)
        across = query - (query @ along) * along
        plane = np.outer(np.cos(turns), along) + np.outer(np.sin(turns), across / lengths(across))
        floor = random.uniform(-0.9, 0.9) * float(lengths(past))
        most = float((plane @ query)[plane @ past <= floor].max())
        assert most <= product_bound(query, past, floor, 1.0) <= most + 2e-3 * float(lengths(query))


@pytest.mark.parametrize("dimension", [2, 5, 384])
def test_scores_may_be_off_as_far_as_float32_allows(dimension: int) -> None:
    """The worst vector was scored too low by all of the error, and is scored too high by all of it now."""
    random = np.random.default_rng(8)
    for _ in range(50):
        past = random.standard_normal(dimension).astype(np.float32)
        query = (past + 0.1 * random.standard_normal(dimension)).astype(np.float32)
        before, now = (product_error(dimension, float(lengths(one)), 1.0) for one in (past, query))
        floor = 0.5 * float(lengths(past))
        along = past.astype(np.float64) / lengths(past)
        across = query - (query @ along) * along
        share = (floor + before) / float(lengths(past))
        most = share * float(along @ query) + math.sqrt(1 - share**2) * float(np.linalg.norm(across))
        assert most + now <= product_bound(query, past, floor, 1.0)


def test_what_tells_nothing_bounds_by_length_alone() -> None:
    zero, query = np.zeros(4, dtype=np.float32), np.full(4, 0.5, dtype=np.float32)
    assert product_bound(query, zero, 0.0, 2.0) == pytest.approx(2.0)
    assert 0 <= product_bound(zero, query, 0.0, 2.0) < 1e-3
    assert product_bound(query, -query, 1e9, 2.0) == pytest.approx(2.0), "a floor that no vector reaches"


# Indexes, and what stands before them ----------------------------------------------------------------------------


class Encoder:
    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def encode(self, texts: Any) -> Any:
        raise AssertionError("vectors are given")


def documents(number: int) -> list[Document]:
    return [Document(id, "", "") for id in range(number)]


def test_a_search_of_the_index_bounds_what_it_left_out() -> None:
    """Real vectors; queries drift from one passage towards another, and everything left out is scored."""
    pytest.importorskip("faiss", reason="needs ralmspec[local]")
    from ralmspec.retrievers.dense import ExactDense

    vectors = np.load(DEMO / "embeddings_wikipedia_minilm_f16.npy").astype(np.float32)
    index = ExactDense(documents(len(vectors)), vectors, Encoder(vectors.shape[1]))
    every = np.arange(len(vectors))
    for start, end in ((5, 900), (77, 78), (4000, 4001)):
        past = Query(text="", vector=vectors[start])
        for k in (1, 20, 512):
            (found,) = index.search([past], k)
            left = index.rows(np.setdiff1d(every, found.ids))
            for share in (0.0, 0.05, 0.3, 1.0):
                query = Query(text="", vector=vectors[start] * (1 - share) + vectors[end] * share)
                assert index.score(query, left).max() <= index.bound(query, past, found)
    (everything,) = index.search([past], len(vectors))
    assert index.bound(past, past, everything) == -math.inf, "nothing was left out"


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_the_bound_holds_for_distractors_and_half_precision_too(kind: Any) -> None:
    """A padded index leaves out distractors as well."""
    pytest.importorskip("faiss", reason="needs ralmspec[local]")
    from ralmspec.retrievers.padded import PaddedDense, with_distractors

    vectors = np.load(DEMO / "embeddings_wikipedia_minilm_f16.npy").astype(kind)[:200]
    index = PaddedDense(documents(200), vectors, Encoder(vectors.shape[1]), pad_to=4000)
    every = with_distractors(vectors.astype(np.float32), 4000, noise=0.5, norm=0.25, seed=0)
    past, query = (Query(text="", vector=vectors[n].astype(np.float32)) for n in (3, 4))
    (found,) = index.search([past], 5)
    left = np.delete(every, found.ids, axis=0)
    assert index.score(query, left).max() <= index.bound(query, past, found)


def test_of_distances_and_approximate_searches_nothing_is_known() -> None:
    pytest.importorskip("faiss", reason="needs ralmspec[local]")
    from ralmspec.retrievers.dense import ExactDense
    from ralmspec.retrievers.hnsw import HNSWDense
    from ralmspec.retrievers.vectors import Vectors

    near = Vectors.open(np.eye(4, dtype=np.float32), metric="squared L2")
    index = ExactDense(documents(4), near, Encoder(4))
    query = Query(text="", vector=np.ones(4, dtype=np.float32))
    assert index.bound(query, query, index.search([query], 2)[0]) == math.inf
    assert bound_of(HNSWDense) is None and bound_of(ExactDense) is not None


def test_what_stands_before_an_index_passes_its_bound_on() -> None:
    query, found = Query(text=""), Ranking(np.array([0]), np.zeros(1, dtype=np.float32))

    class Bound(FakeRetriever):
        def bound(self, query: Query, past: Query, found: Ranking) -> float:
            return 7.0

    for wrapper in (SetLatency(Bound(), 0.0), Retrying(Bound())):
        assert wrapper.bound(query, query, found) == 7.0
    for wrapper in (SetLatency(FakeRetriever(), 0.0), Retrying(FakeRetriever())):
        assert wrapper.bound(query, query, found) == math.inf
