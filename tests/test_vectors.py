"""Vectors: every kind decoded exactly, checked block by block, served where it lies; wrong files refused by name."""

import gc
import importlib.util
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from ralmspec.retrievers.errors import BadKnowledge
from ralmspec.retrievers.vectors import BFLOAT16, DTYPES, Kind, Memory, Metric, Vectors, narrow

NAN, INF = float("nan"), float("inf")
KINDS: list[Kind] = ["float32", "float16", "bfloat16"]
MEMORIES: list[Memory] = ["map", "copy", "float32"]
METRICS: list[Metric] = ["inner product", "squared L2"]

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs faiss (the extra 'local')")


def every_pattern(kind: Kind) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """All 65,536 numbers of a half kind, 64 a row, and what they are as float32."""
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(1024, 64)
    if kind == "float16":
        return bits.view(np.float16), bits.view(np.float16).astype(np.float32)
    return bits.view(BFLOAT16), (bits.astype(np.uint32) << 16).view(np.float32)


def some(kind: Kind, rows: int = 9000, dimension: int = 7) -> NDArray[Any]:
    return narrow(np.random.default_rng(0).standard_normal((rows, dimension)), kind)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_finite_half_is_decoded_exactly_and_encoded_back(kind: Kind) -> None:
    stored, true = every_pattern(kind)
    finite = np.isfinite(true).all(axis=1)
    decoded = Vectors.open(stored[finite]).block(0, 1024)
    assert decoded.view(np.uint32).tolist() == true[finite].view(np.uint32).tolist()  # signed zeros too
    assert narrow(decoded, kind).tobytes() == stored[finite].tobytes()


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_half_that_is_not_finite_is_refused(kind: Kind) -> None:
    stored, true = every_pattern(kind)
    bad = stored[~np.isfinite(true)]
    assert len(bad) >= 2 * 128
    for number in bad[:: len(bad) // 100]:
        holder = np.zeros((3, 2), stored.dtype)
        holder[2, 1] = number
        with pytest.raises(BadKnowledge, match="vector 2 is not finite"):
            Vectors.open(holder)


@given(arrays.arrays(np.uint32, st.integers(1, 40)))
def test_bfloat16_is_the_nearest_with_ties_to_even(bits: NDArray[np.uint32]) -> None:
    given = bits.view(np.float32)
    given = given[np.abs(given) < 3.38e38]  # the largest bfloat16 is 3.39e38; NaN goes too
    made = narrow(given[np.newaxis], "bfloat16").view(np.uint16)[0].astype(np.int64)
    exact = given.astype(np.float64)

    def off(code: NDArray[np.int64]) -> NDArray[np.float64]:
        number: NDArray[np.float64] = (code.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return np.abs(number - exact)

    for other in (made - 1, made + 1):
        # Codes next to each other are numbers next to each other, except across the two zeros.
        real = (made & 0x7FFF != 0) & (other & 0x7F80 != 0x7F80)
        mine, theirs = off(made)[real], off(other)[real]
        assert (mine <= theirs).all()
        assert (made[real][mine == theirs] % 2 == 0).all()


@pytest.mark.parametrize(
    ("kind", "number"),
    [("float32", NAN), ("float32", INF), ("float16", 65520.0), ("float16", NAN), ("bfloat16", 3.4e38)]
    + [("bfloat16", NAN), ("bfloat16", -INF)],
)
def test_numbers_that_a_kind_cannot_hold_are_refused(kind: Kind, number: float) -> None:
    with pytest.raises(BadKnowledge, match=f"row 1 has a number that {kind} cannot hold"):
        narrow(np.array([[1.0, 2.0], [number, 0.0]], np.float32), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_files_and_arrays_of_every_kind_are_the_same_vectors(tmp_path: Path, kind: Kind, memory: Memory) -> None:
    stored = some(kind)
    np.save(tmp_path / "vectors.npy", stored)
    expected = Vectors.open(stored, memory="float32").stored
    for source in (tmp_path / "vectors.npy", str(tmp_path / "vectors.npy"), stored):
        vectors = Vectors.open(source, count=9000, dimension=7, memory=memory)
        assert vectors.kind == ("float32" if memory == "float32" else kind)
        assert vectors.block(8990, 9000).tobytes() == expected[8990:].tobytes()
        assert vectors.take(np.array([5, 8999, 5])).tobytes() == expected[[5, 8999, 5]].tobytes()
        blocks = [(start, block.copy()) for start, block in vectors.blocks(4000)]
        assert [start for start, _ in blocks] == [0, 4000, 8000]
        assert np.concatenate([block for _, block in blocks]).tobytes() == expected.tobytes()
        assert vectors.longest == pytest.approx(np.linalg.norm(expected.astype(np.float64), axis=1).max(), rel=1e-5)


def test_a_builder_can_write_bfloat16_piece_by_piece(tmp_path: Path) -> None:
    path, rows = tmp_path / "vectors.npy", np.arange(12, dtype=np.float32).reshape(4, 3)
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=DTYPES["bfloat16"], shape=(4, 3))
    mapped[:2], mapped[2:] = narrow(rows[:2], "bfloat16"), narrow(rows[2:], "bfloat16")
    del mapped
    vectors = Vectors.open(path)
    assert vectors.kind == "bfloat16"
    assert vectors.block(0, 4).tolist() == rows.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_checking_a_file_does_not_hold_it_in_memory(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / "vectors.npy"
    np.save(path, some(kind, rows=200_000, dimension=16))
    tracemalloc.start()
    try:
        vectors = Vectors.open(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(vectors) == 200_000
    assert peak < path.stat().st_size / 4


def test_a_map_is_the_array_itself_and_a_copy_is_not() -> None:
    stored = some("float16")
    assert np.shares_memory(Vectors.open(stored).stored, stored)
    assert not np.shares_memory(Vectors.open(stored, memory="copy").stored, stored)


def test_open_vectors_are_served_as_they_are() -> None:
    vectors = Vectors.open(some("float16"))
    assert Vectors.open(vectors, count=9000, dimension=7, memory="float32") is vectors
    assert (vectors.metric, vectors.description) == ("inner product", "9,000 x 7 float16")
    with pytest.raises(BadKnowledge, match="9000 vectors for 8 passages"):
        Vectors.open(vectors, count=8)


def test_open_vectors_keep_their_metric() -> None:
    vectors = Vectors.open(some("float16"), metric="squared L2")
    assert Vectors.open(vectors) is vectors
    assert (vectors.metric, vectors.description) == ("squared L2", "9,000 x 7 float16, squared L2")


@pytest.mark.parametrize("length", [0.0, 1e-38, 1e-20, 1.0, 1e18, 1e30, 3e38])
def test_the_longest_is_known_where_its_square_is_not_a_float32(length: float) -> None:
    stored = np.zeros((5000, 4), np.float32)
    stored[4999, 2] = length
    assert Vectors.open(stored).longest == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.ones((2, 2), np.uint16), "holds uint16; store the vectors as float32, float16 or BFLOAT16"),
        (np.ones((2, 2), ">f4"), "holds >f4"),
        (np.ones((2, 2), np.float64), "holds float64"),
        (np.ones(4, np.float32), r"shape \[4\]"),
        (np.ones((0, 2), np.float32), r"holds no numbers, its shape is \[0, 2\]"),
        (np.ones((2, 0), np.float32), r"holds no numbers, its shape is \[2, 0\]"),
        (np.array([[1, 1], [1, NAN]], np.float32), "vector 1 is not finite"),
        (np.array([[1, -INF], [1, NAN]], np.float16), "vector 0 is not finite"),
    ],
)
@pytest.mark.parametrize("memory", MEMORIES)
def test_what_is_no_vectors_is_refused_by_name(
    tmp_path: Path, stored: NDArray[Any], message: str, memory: Memory
) -> None:
    np.save(tmp_path / "bad.npy", stored)
    with pytest.raises(BadKnowledge, match=rf"bad\.npy: .*{message}"):
        Vectors.open(tmp_path / "bad.npy", memory=memory)


def test_a_number_that_is_not_finite_is_found_in_the_last_block() -> None:
    stored = some("bfloat16").copy()
    stored.view(np.uint16)[8998, 3] = 0x7F80
    with pytest.raises(BadKnowledge, match="vector 8998 is not finite"):
        Vectors.open(stored)


def test_rows_that_lie_apart_can_be_copied_but_not_mapped(tmp_path: Path) -> None:
    stored = some("bfloat16")
    np.save(tmp_path / "columns.npy", np.asfortranarray(stored))
    with pytest.raises(BadKnowledge, match=r"columns\.npy: its rows do not lie one after the other"):
        Vectors.open(tmp_path / "columns.npy")
    assert Vectors.open(tmp_path / "columns.npy", memory="copy").stored.tobytes() == stored.tobytes()


def test_an_unknown_place_in_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="map or copy or float32, not 'disk'"):
        Vectors.open(some("float32"), memory="disk")  # type: ignore[arg-type]


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="inner product or squared L2, not 'cosine'"):
        Vectors.open(some("float32"), metric="cosine")  # type: ignore[arg-type]


@needs_faiss
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_faiss_looks_at_vectors_where_they_lie(kind: Kind, metric: Metric) -> None:
    stored = some(kind, rows=500).copy()
    vectors = Vectors.open(stored, metric=metric)
    probe = np.ones((1, 7), np.float32)
    found, ids = vectors.as_faiss(100, 300).search(probe, 5)
    rows = vectors.block(100, 300)
    true = -(rows @ probe[0]) if metric == "inner product" else ((rows - probe[0]) ** 2).sum(axis=1)
    assert ids[0].tolist() == np.argsort(true)[:5].tolist()
    assert found[0] == pytest.approx(np.abs(np.sort(true)[:5]), rel=1e-5)
    index = vectors.as_faiss()
    (best,) = index.search(probe, 1)[1][0].tolist()
    stored[17] = stored[best]
    assert set(index.search(probe, 2)[1][0].tolist()) == {17, best}


@needs_faiss
def test_vectors_live_as_long_as_the_faiss_index_over_them() -> None:
    index = Vectors.open(some("float32"), memory="copy").as_faiss()
    gc.collect()
    taken = [np.full((9000, 7), NAN, np.float32) for _ in range(5)]  # would be written where the vectors were
    assert np.isfinite(index.reconstruct_n(0, 9000)).all()
    assert len(taken) == 5
