"""Codes: the same rankings as without them, whatever the vectors; the int8 product; threads left as they were."""

import gc
import importlib.util
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ralmspec.retrievers import codes as module
from ralmspec.retrievers.base import Document, Query, Ranking
from ralmspec.retrievers.codes import Codes
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.int8 import Int8Product
from ralmspec.retrievers.proposals import Scan
from ralmspec.retrievers.vectors import Metric, Vectors

if importlib.util.find_spec("faiss") is None or importlib.util.find_spec("torch") is None:
    pytest.skip("needs faiss and torch (the extra 'local')", allow_module_level=True)

import torch

METRICS: list[Metric] = ["inner product", "squared L2"]


class Wide:
    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def encode(self, texts: Any) -> NDArray[np.float32]:
        raise AssertionError("queries come with vectors")


def exact(vectors: NDArray[Any], scan: Scan, metric: Metric, threads: int = 1) -> ExactDense:
    documents = [Document(i, "", "") for i in range(len(vectors))]
    return ExactDense(
        documents, Vectors.open(vectors, metric=metric), Wide(vectors.shape[1]), scan=scan, threads=threads
    )


def asked(vectors: NDArray[Any]) -> list[Query]:
    return [Query(text="q", vector=vector) for vector in vectors.astype(np.float32)]


def brute(retriever: ExactDense, query: Query, k: int) -> Ranking:
    """By definition, with no scan at all."""
    assert query.vector is not None
    return retriever._scan(query.vector, min(k, len(retriever)))


def same(one: Ranking, other: Ranking) -> bool:
    return np.array_equal(one.ids, other.ids) and one.scores.tobytes() == other.scores.tobytes()


def near_ties(random: np.random.Generator) -> NDArray[np.float32]:
    """One vector over and over, each time with one number moved to the next float32."""
    vectors = np.repeat(random.standard_normal((1, 40), dtype=np.float32), 900, axis=0)
    places = random.integers(0, 40, 900)
    vectors[np.arange(900), places] = np.nextafter(vectors[np.arange(900), places], np.float32(9))
    return vectors


HARD: dict[str, Callable[[np.random.Generator], NDArray[np.float32]]] = {
    "near ties": near_ties,
    "all equal": lambda random: np.full((900, 40), random.standard_normal(), dtype=np.float32),
    "all zero": lambda random: np.zeros((900, 40), dtype=np.float32),
    "lengths from 1e-30 to 1e10": lambda random: (
        random.standard_normal((900, 40)) * 10.0 ** random.uniform(-30, 10, (900, 1))
    ).astype(np.float32),
    "one far longer": lambda random: (
        random.standard_normal((900, 40)) * np.where(np.arange(900) == 450, 1e6, 1)[:, np.newaxis]
    ).astype(np.float32),
    "below the normal range": lambda random: (1e-40 * random.standard_normal((900, 40))).astype(np.float32),
    "partly below the normal range": lambda random: np.where(
        random.random((900, 40)) < 0.5, 1e-40, random.standard_normal((900, 40))
    ).astype(np.float32),
    "duplicates": lambda random: random.standard_normal((9, 40), dtype=np.float32)[random.integers(0, 9, 900)],
    "halfway between codes": lambda random: (random.integers(-253, 254, (900, 40)) / 2).astype(np.float32),
    "one vector": lambda random: random.standard_normal((1, 40), dtype=np.float32),
    "one number": lambda random: random.standard_normal((900, 1), dtype=np.float32),
    "apart": lambda random: random.standard_normal((900, 40), dtype=np.float32),
}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HARD)
def test_hard_vectors_rank_as_if_each_were_scored(
    monkeypatch: pytest.MonkeyPatch, name: str, metric: Metric, small: bool
) -> None:
    if small:
        for constant, value in (("_TILE", 2000), ("_BLOCK", 64), ("_GROUP", 3)):
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(Codes, "tries", lambda _, k: (k + 3, 4 * k + 10))
    random = np.random.default_rng(7)
    vectors = HARD[name](random)
    queries = np.concatenate(
        [
            vectors[: min(4, len(vectors))],
            vectors[:1] * np.float32(1.001),
            random.standard_normal((3, vectors.shape[1])),
        ]
    )
    queries = np.concatenate([queries, np.zeros_like(queries[:1]), 1e-42 * np.ones_like(queries[:1])])
    codes, stored = exact(vectors, "codes", metric), exact(vectors, "stored", metric)
    for k in (1, 20, 300, len(vectors), len(vectors) + 7):
        together = codes.search(asked(queries), k)
        for query, ranking, other in zip(asked(queries), together, stored.search(asked(queries), k), strict=True):
            assert same(ranking, brute(codes, query, k))
            assert same(ranking, other)
            assert same(ranking, codes.search([query], k)[0])


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 600),
    dimension=st.integers(1, 50),
    k=st.integers(1, 60),
    batch=st.integers(1, 12),
    stretch=st.sampled_from([0.0, 0.5, 3.0]),
    threads=st.integers(1, 2),
    metric=st.sampled_from(METRICS),
)
@settings(max_examples=60, deadline=None)
def test_rankings_are_those_of_float64_where_it_can_tell(
    seed: int, n: int, dimension: int, k: int, batch: int, stretch: float, threads: int, metric: Metric
) -> None:
    random = np.random.default_rng(seed)
    vectors = (random.standard_normal((n, dimension)) * 10 ** (stretch * random.standard_normal((n, 1)))).astype("f4")
    queries = asked(random.standard_normal((batch, dimension)))
    retriever = exact(vectors, "codes", metric, threads)
    for query, ranking in zip(queries, retriever.search(queries, k), strict=True):
        assert query.vector is not None
        q, x = query.vector.astype(np.float64), vectors.astype(np.float64)
        true = x @ q if metric == "inner product" else -((x - q) ** 2).sum(axis=1)
        scale = np.abs(x) @ np.abs(q) if metric == "inner product" else -true
        error = (dimension + 3) * 2.0**-24 * scale
        assert len(ranking.ids) == min(k, n)
        assert (np.abs(ranking.scores - true[ranking.ids]) <= error[ranking.ids]).all()
        left = np.setdiff1d(np.arange(n), ranking.ids)
        assert (true[left] - error[left] <= float(ranking.scores[-1])).all()  # nothing surely better was left out
        assert same(ranking, brute(retriever, query, k))


@pytest.mark.parametrize("metric", METRICS)
def test_faiss_and_the_product_propose_the_same_scores(metric: Metric) -> None:
    """Whole numbers: which of the two a batch has, can be seen in no candidate."""
    random = np.random.default_rng(1)
    made = Codes.of(Vectors.open(random.standard_normal((3000, 100), dtype=np.float32), metric=metric))
    assert made is not None
    queries = random.standard_normal((9, 100), dtype=np.float32)
    many, ids = made.propose(queries, 40, 500, 2900)
    assert ids.min() >= 500
    assert ids.max() < 2900
    for row, query in enumerate(queries):
        few, places = made.propose(query[np.newaxis], 39, 500, 2900)
        assert set(places[0].tolist()) <= set(ids[row].tolist())  # one less: the 40th may be tied
        assert np.sort(few[0]).tolist() == np.sort(many[row])[1:].tolist()


def test_ties_at_the_floor_do_not_pile_up() -> None:
    """Equal values pass no floor: what is held stays small, however many there are."""
    kept = module._Largest(2, 5)
    for tile in range(100):
        kept.add(np.full((2, 1000), 3, np.int32), 1000 * tile)
        assert kept._held <= 2000
    values, ids = kept.result()
    assert values.tolist() == [[3] * 5] * 2
    assert all(len(set(row)) == 5 for row in ids.tolist())


def test_codes_cost_a_byte_a_number_and_can_be_left_out() -> None:
    vectors = np.random.default_rng(0).standard_normal((40_000, 64)).astype(np.float16)
    with_codes, without = exact(vectors, "codes", "squared L2"), exact(vectors, "stored", "squared L2")
    assert with_codes._codes is not None
    assert with_codes._codes.nbytes == vectors.size + 4 * len(vectors)
    assert "int8 scan (2 MiB of codes)" in with_codes.description
    assert without._codes is None
    assert "faiss flat scan" in without.description
    with pytest.raises(ValueError, match="codes or stored, not 'int4'"):
        exact(vectors, "int4", "squared L2")  # type: ignore[arg-type]


@pytest.mark.parametrize("vectors", [np.zeros((3, 2)), np.full((3, 2), 1e-30), np.full((3, 2), 1e30)])
def test_vectors_that_codes_cannot_hold_are_scanned_as_they_are(vectors: NDArray[Any]) -> None:
    retriever = exact(vectors.astype(np.float32), "codes", "inner product")
    assert retriever._codes is None
    assert "flat scan" in retriever.description


def test_the_product_is_found_where_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.13 gets products of one number wrong on some processors; none may be believed unseen."""
    product = Int8Product.find(384)
    if product is None:
        pytest.skip("this torch has no exact int8 product")
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda one, other: real(one, other).clamp(max=32767))  # as if saturating
    assert Int8Product.find(384) is None
    monkeypatch.delattr(torch, "_int_mm")
    assert Int8Product.find(384) is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert Int8Product.find(384) is None
    random = np.random.default_rng(3)
    queries = asked(random.standard_normal((9, 16)))
    alone = exact(random.standard_normal((700, 16), dtype=np.float32), "codes", "inner product")
    for query, ranking in zip(queries, alone.search(queries, 10), strict=True):
        assert same(ranking, brute(alone, query, 10))


def test_a_product_leaves_torch_s_threads_as_they_were() -> None:
    """In the product there is one, afterwards as many as before; other threads, early and late, have theirs."""
    product = Int8Product.find(16)
    if product is None:
        pytest.skip("this torch has no exact int8 product")
    before, seen = torch.get_num_threads(), list[int]()
    torch.set_num_threads(3)
    try:
        with product.one_thread():
            assert torch.get_num_threads() == 1
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
        assert torch.get_num_threads() == 3
        retriever = exact(
            np.random.default_rng(0).standard_normal((9000, 16), dtype=np.float32), "codes", "inner product", threads=2
        )
        retriever.search(asked(np.ones((8, 16))), 5)
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [3, 3]
        del retriever
        gc.collect()
    finally:
        torch.set_num_threads(before)
