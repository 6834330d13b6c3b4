"""ExactDense: the true ranking, the same scores in every batch and outside the index, ties by id."""

import gc
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ralmspec.retrievers import codes, flat
from ralmspec.retrievers import dense as module
from ralmspec.retrievers.base import Document, Query, Ranking, Vector
from ralmspec.retrievers.codes import Codes
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.errors import BadKnowledge, MissingExtra, RetrieverFailed
from ralmspec.retrievers.proposals import Found, Proposer, Scan
from ralmspec.retrievers.vectors import Kind, Memory, Metric, Vectors, narrow

if importlib.util.find_spec("faiss") is None:
    pytest.skip("needs faiss (the extra 'local')", allow_module_level=True)

NAN, INF = float("nan"), float("inf")
KINDS: list[Kind] = ["float32", "float16", "bfloat16"]
METRICS: list[Metric] = ["inner product", "squared L2"]
SCANS: list[Scan] = ["codes", "stored"]


@pytest.fixture(autouse=True, scope="module", params=["in small pieces", "as it ships"])
def pieces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test twice: few vectors would fill one tile and one thread's part, so once both are made tiny."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in small pieces":
            patch.setattr(flat, "_TILE", 2000)
            patch.setattr(flat, "_PENDING", 3)
            patch.setattr(flat, "_FEW", 10_000)
            patch.setattr(codes, "_TILE", 3000)
            patch.setattr(codes, "_BLOCK", 70)
            patch.setattr(codes, "_GROUP", 7)
            patch.setattr(module, "_SLICE", 50)
        yield


class Words:
    """Encodes a text of numbers as those numbers, and counts what it was asked for."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += texts
        return np.array([[float(word) for word in text.split()] for text in texts], dtype=np.float32)


def documents(n: int) -> list[Document]:
    return [Document(i, f"title {i}", f"text {i}") for i in range(n)]


def dense(
    vectors: NDArray[Any],
    *,
    blas_threshold: int | None = 1,
    memory: Memory = "float32",
    scan: Scan = "codes",
    threads: int = 1,
    metric: Metric = "inner product",
) -> ExactDense:
    return ExactDense(
        documents(len(vectors)),
        vectors if metric == "inner product" else Vectors.open(vectors, memory=memory, metric=metric),
        Words(vectors.shape[1]),
        blas_threshold=blas_threshold,
        memory=memory,
        scan=scan,
        threads=threads,
    )


def exactly(metric: Metric, vector: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """The scores by their definition, in the arithmetic of the arguments."""
    scores: NDArray[Any] = rows @ vector if metric == "inner product" else -((rows - vector) ** 2).sum(axis=1)
    return scores


def searches_and_scans(retriever: ExactDense, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Fills, from now on, with how many queries each try was for, and with a k for each query whose vectors were all
    scored."""
    searches: list[int] = []
    scans: list[int] = []
    among, scan = retriever._among, retriever._scan

    def counted_among(proposer: Proposer, fetch: int, vectors: NDArray[np.float32], k: int) -> list[Ranking | None]:
        searches.append(len(vectors))
        return among(proposer, fetch, vectors, k)

    def counted_scan(vector: Vector, k: int) -> Ranking:
        scans.append(k)
        return scan(vector, k)

    monkeypatch.setattr(retriever, "_among", counted_among)
    monkeypatch.setattr(retriever, "_scan", counted_scan)
    return searches, scans


def query(vector: NDArray[np.float32]) -> Query:
    return Query(text="q", vector=vector)


def same(one: Ranking, other: Ranking) -> bool:
    return np.array_equal(one.ids, other.ids) and one.scores.tobytes() == other.scores.tobytes()


def by_one_kernel(retriever: ExactDense, vector: Vector, k: int) -> Ranking:
    """The ranking by definition: score every document, sort by (-score, id)."""
    ids = np.arange(len(retriever))
    scores = retriever.score(query(vector), retriever.rows(ids))
    order = sorted(ids.tolist(), key=lambda id: (-float(scores[id]), id))[:k]
    return Ranking(np.array(order), scores[order])


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 400),
    dimension=st.integers(1, 6),
    k=st.integers(1, 420),
    batch=st.integers(1, 9),
    blas_threshold=st.sampled_from([1, 1 << 30]),
    kind=st.sampled_from(KINDS),
    threads=st.integers(1, 3),
    metric=st.sampled_from(METRICS),
    scan=st.sampled_from(SCANS),
)
@settings(deadline=None)
def test_exact_ties_stand_by_id(
    seed: int,
    n: int,
    dimension: int,
    k: int,
    batch: int,
    blas_threshold: int,
    kind: Kind,
    threads: int,
    metric: Metric,
    scan: Scan,
) -> None:
    """Small integers: many duplicates and ties, and scores that integer arithmetic knows exactly."""
    random = np.random.default_rng(seed)
    vectors, queries = random.integers(-2, 3, (n, dimension)), random.integers(-2, 3, (batch, dimension))
    stored = narrow(vectors, kind)
    retriever = dense(stored, blas_threshold=blas_threshold, memory="map", scan=scan, threads=threads, metric=metric)
    rankings = retriever.search([query(q.astype(np.float32)) for q in queries], k)
    for ranking, q in zip(rankings, queries, strict=True):
        scores = exactly(metric, q, vectors)
        expected = sorted(range(n), key=lambda id: (-scores[id], id))[:k]
        assert ranking.ids.tolist() == expected
        assert ranking.scores.tolist() == scores[expected].tolist()
        assert not np.signbit(ranking.scores[ranking.scores == 0]).any()


@given(
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.0, 1e-8, 1e-7, 1e-6, 1e-3, 1.0]),
    k=st.sampled_from([1, 4, 20, 64]),
    length=st.sampled_from([1e-30, 1.0, 1e10]),
    kind=st.sampled_from(["float32", "bfloat16"]),
    threads=st.integers(1, 3),
    metric=st.sampled_from(METRICS),
    scan=st.sampled_from(SCANS),
)
@settings(max_examples=60, deadline=None)
def test_vectors_closer_than_float32_can_tell_still_rank_by_the_one_kernel(
    seed: int, spread: float, k: int, length: float, kind: Kind, threads: int, metric: Metric, scan: Scan
) -> None:
    """By distance, BLAS subtracts large sums of squares that nearly cancel out where the query lies among them."""
    random = np.random.default_rng(seed)
    centre = random.standard_normal(96)
    vectors = (length * (centre + spread * random.standard_normal((700, 96)))).astype(np.float32)
    queries = random.standard_normal((5, 96), dtype=np.float32)
    if metric == "squared L2":
        queries[:3] = length * centre + length * spread * queries[:3]
        queries[3] = vectors[17]
    retriever = dense(narrow(vectors, kind), memory="map", scan=scan, threads=threads, metric=metric)
    for q, ranking in zip(queries, retriever.search([query(q) for q in queries], k), strict=True):
        assert same(ranking, by_one_kernel(retriever, q, k))


@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 16),
    k=st.sampled_from([1, 4, 20, 256]),
    kind=st.sampled_from(KINDS),
    threads=st.integers(1, 3),
    metric=st.sampled_from(METRICS),
    scan=st.sampled_from(SCANS),
)
@settings(max_examples=60, deadline=None)
def test_batch_k_threads_and_storage_change_no_bit_of_any_ranking(
    seed: int, batch: int, k: int, kind: Kind, threads: int, metric: Metric, scan: Scan
) -> None:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((1500, 384), dtype=np.float32)
    vectors[::7] = vectors[3]  # runs of duplicates among them
    stored = narrow(vectors, kind)
    queries = [query(q) for q in random.standard_normal((batch, 384), dtype=np.float32)]
    plain = dense(stored, blas_threshold=1000, scan="stored", metric=metric)
    mapped = dense(stored, blas_threshold=1000, memory="map", scan=scan, threads=threads, metric=metric)
    for alone, together in zip(queries, mapped.search(queries, k), strict=True):
        assert same(mapped.search([alone], k)[0], together)
        assert same(plain.search([alone], 300)[0].top(k), together)
        assert together.scores.tobytes() == mapped.score(alone, mapped.rows(together.ids)).tobytes()


@pytest.mark.parametrize("metric", METRICS)
def test_a_score_does_not_depend_on_where_the_vectors_lie(metric: Metric) -> None:
    random = np.random.default_rng(4)
    retriever = dense(random.standard_normal((300, 384), dtype=np.float32), metric=metric)
    rows, probe = retriever.rows(np.arange(300)), query(random.standard_normal(384, dtype=np.float32))
    expected = retriever.score(probe, rows).tobytes()
    for offset in range(1, 17):
        moved = np.empty(300 * 384 + 16, np.float32)[offset : offset + 300 * 384].reshape(300, 384)
        moved[:] = rows
        assert retriever.score(probe, moved).tobytes() == expected


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_their_definition_to_float32(metric: Metric) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((3000, 384), dtype=np.float32)
    q = random.standard_normal(384, dtype=np.float32)
    true = exactly(metric, q.astype(np.float64), vectors.astype(np.float64))
    for threshold in (1, 1 << 30):
        (ranking,) = dense(vectors, metric=metric, blas_threshold=threshold).search([query(q)], 10)
        assert ranking.ids.tolist() == np.argsort(-true)[:10].tolist()
        assert ranking.scores == pytest.approx(true[ranking.ids], rel=1e-5)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_search_reads_the_index_once_where_scores_are_apart(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, metric: Metric, scan: Scan
) -> None:
    """The full scan is for ties; were it taken always, exactness would cost a scan a query."""
    random = np.random.default_rng(1)
    stored = narrow(random.standard_normal((5000, 384)), kind)
    retriever = dense(stored, memory="map", scan=scan, threads=2, metric=metric)
    searches, scans = searches_and_scans(retriever, monkeypatch)
    retriever.search([query(q) for q in random.standard_normal((16, 384), dtype=np.float32)], 20)
    assert (searches, scans) == ([16], [])


@pytest.mark.parametrize("kind", KINDS)
def test_distances_small_beside_the_lengths_do_not_need_a_scan(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """Hidden states of a model: lengths of about 30 and a few of 3,000, distances between neighbours of about 10."""
    random = np.random.default_rng(2)
    steps = random.standard_normal((5000, 256)) * random.uniform(0.05, 0.6, (5000, 1))
    states = np.zeros((5000, 256))
    for before, (state, step) in enumerate(zip(states[1:], steps, strict=False)):
        state[:] = 0.9 * states[before] + step
    states = 2 + states
    states[:3] *= 100
    retriever = dense(narrow(states, kind), memory="map", scan="stored", metric="squared L2")
    searches, scans = searches_and_scans(retriever, monkeypatch)
    probes = [query(state) for state in (states[50::300] + 0.05 * random.standard_normal(256)).astype(np.float32)]
    for k in (1, 20, 256):
        for probe, ranking in zip(probes, retriever.search(probes, k), strict=True):
            assert probe.vector is not None
            assert same(ranking, by_one_kernel(retriever, probe.vector, k))
    assert (searches, scans) == ([17] * 3, [])


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_long_runs_of_duplicates_are_searched_for_more_before_everything_is_scanned(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, metric: Metric, scan: Scan
) -> None:
    random = np.random.default_rng(3)
    distinct = random.standard_normal((50, 64)) + 3
    copies = np.repeat(distinct, 100, axis=0)
    copies[::10] += 1e-5 * random.standard_normal((500, 64))  # nearly the same
    shuffled = narrow(copies[random.permutation(5000)], kind)
    retriever = dense(shuffled, memory="map", scan=scan, metric=metric)
    searches, scans = searches_and_scans(retriever, monkeypatch)
    probes = [query(row) for row in (distinct[:4] + 0.1 * random.standard_normal((4, 64))).astype(np.float32)]
    for k in (1, 20, 100, 250):
        for probe, ranking in zip(probes, retriever.search(probes, k), strict=True):
            assert probe.vector is not None
            assert same(ranking, by_one_kernel(retriever, probe.vector, k))
    assert scans == []
    assert searches[0] == 4
    assert len(searches) > 4 or scan == "codes"  # whose first try is for several runs at once


@given(
    seed=st.integers(0, 2**32),
    dimension=st.sampled_from([1, 3, 16, 33, 256, 1100]),
    batch=st.sampled_from([1, 9]),
    blas_threshold=st.sampled_from([1, 1 << 30]),
    offset=st.sampled_from([0.0, 1.0, 1e3, 1e5]),
    length=st.sampled_from([1e-22, 1e-3, 1.0, 1e3, 1e12]),
    asked=st.sampled_from([1e-3, 1.0, 30.0]),
    one_long=st.booleans(),
    kind=st.sampled_from(KINDS),
    metric=st.sampled_from(METRICS),
)
@settings(max_examples=150, deadline=None)
def test_every_scan_and_the_one_kernel_differ_by_less_than_the_margins(
    seed: int,
    dimension: int,
    batch: int,
    blas_threshold: int,
    offset: float,
    length: float,
    asked: float,
    one_long: bool,
    kind: Kind,
    metric: Metric,
) -> None:
    """What the proofs stand on; and each is as near to the truth."""
    random = np.random.default_rng(seed)
    length = np.clip(length, 1e-3, 0.1) if kind == "float16" else length
    vectors = length * (offset + random.standard_normal((300, dimension)))
    vectors[7] *= 1e4 if one_long and kind != "float16" else 1
    assume(max(asked, 1) * np.abs(vectors).max() * dimension**0.5 < 1e18)  # the others are refused
    stored = narrow(vectors, kind)
    queries = (asked * length * (offset + random.standard_normal((batch, dimension)))).astype(np.float32)
    retriever = dense(stored, memory="map", metric=metric, blas_threshold=blas_threshold)
    for proposer in retriever._proposers:
        proposed, ids = retriever._propose(proposer, queries, 300)
        for q, theirs, row in zip(queries, proposed, ids, strict=True):
            assert sorted(row.tolist()) == list(range(300))
            rows = retriever.rows(row)
            ours = retriever.score(query(q), rows)
            margins = proposer.margins(q, ours)
            true = exactly(metric, q.astype(np.float64), rows.astype(np.float64))
            assert (np.abs(theirs - ours.astype(np.float64)) <= margins).all()
            assert (np.abs(true - ours) <= margins).all()
            assert (np.diff((ours - margins)[np.argsort(ours)]) >= 0).all()  # a better score stays the better one


@pytest.mark.parametrize("metric", METRICS)
def test_a_faiss_that_multiplied_in_less_than_float32_would_not_be_believed(
    monkeypatch: pytest.MonkeyPatch, metric: Metric
) -> None:
    random = np.random.default_rng(5)
    vectors, q = random.standard_normal((5000, 64), dtype=np.float32), random.standard_normal(64, dtype=np.float32)
    retriever = dense(vectors, metric=metric, scan="stored")
    rough = 2.0 if metric == "inner product" else 10.0
    coarse = (exactly(metric, q, vectors) + random.normal(scale=rough, size=5000)).astype(np.float32)
    true = by_one_kernel(retriever, q, 20)

    def propose(_: Proposer, queries: NDArray[np.float32], fetch: int) -> Found:
        ids = np.argsort(-coarse)[:fetch]
        scores = coarse[ids]
        scores[10:] -= 40  # so that the smallest lies far below the k-th, which would prove that none was missed
        assert not set(true.ids.tolist()) <= set(ids.tolist())
        return scores[np.newaxis], ids[np.newaxis]

    monkeypatch.setattr(retriever, "_propose", propose)
    assert same(retriever.search([query(q)], 20)[0], true)


def test_stored_float16_and_float32_and_files_and_arrays_serve_alike(tmp_path: Path) -> None:
    vectors = np.random.default_rng(2).standard_normal((9000, 8)).astype(np.float16)  # more than one chunk
    half, single = tmp_path / "half.npy", tmp_path / "single.npy"
    np.save(half, vectors)
    np.save(single, vectors.astype(np.float32))
    probe = query(np.ones(8, np.float32))
    expected = dense(vectors).search([probe], 30)[0]
    for stored in (half, str(single), np.asfortranarray(vectors)):
        retriever = ExactDense(documents(9000), stored, Words(8))
        assert same(retriever.search([probe], 30)[0], expected)
    assert "9,000 x 8" in retriever.description


@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_at_its_limits_is_searched_exactly(metric: Metric) -> None:
    """Numbers below the normal range and the largest ones: decoded by faiss in the scan, by us for the scores."""
    random = np.random.default_rng(6)
    bits = random.integers(0, 1 << 16, (2000, 32)).astype(np.uint16)
    bits[:1500] &= 0x83FF  # float16 without an exponent: all below the normal range
    stored = np.where(np.isfinite(bits.view(np.float16)), bits.view(np.float16), np.float16(65504))
    retriever, q = dense(stored, memory="map", metric=metric), random.standard_normal(32, dtype=np.float32)
    for k in (1, 400, 1990):
        assert same(retriever.search([query(q)], k)[0], by_one_kernel(retriever, q, k))


def test_mapped_vectors_are_served_where_they_lie_and_shared(tmp_path: Path) -> None:
    vectors = np.random.default_rng(2).standard_normal((3000, 8)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    opened = Vectors.open(tmp_path / "v.npy")
    one, other = (ExactDense(documents(3000), opened, Words(8)) for _ in range(2))
    assert isinstance(one._vectors.stored.base, np.memmap)
    assert one._vectors.stored is other._vectors.stored
    probe = query(np.ones(8, np.float32))
    assert same(one.search([probe], 30)[0], dense(vectors).search([probe], 30)[0])


def test_threads_are_ours_have_one_openmp_thread_each_and_end_with_the_retriever() -> None:
    import faiss

    retriever = dense(np.random.default_rng(0).standard_normal((9000, 8), dtype=np.float32), threads=3)
    before = set(threading.enumerate())
    assert retriever._in_threads(lambda part: (part, faiss.omp_get_max_threads()), range(5)) == [
        (part, 1) for part in range(5)
    ]
    retriever.search([query(np.ones(8, np.float32))], 5)
    ours = set(threading.enumerate()) - before
    assert 1 <= len(ours) <= 3
    del retriever
    gc.collect()
    for thread in ours:
        thread.join(10)
        assert not thread.is_alive()


def test_an_error_in_a_thread_is_the_search_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = dense(np.ones((9000, 8), np.float32), threads=2)

    def fails(*_: Any) -> None:
        raise RetrieverFailed("from a thread")

    monkeypatch.setattr(Codes, "propose", fails)
    with pytest.raises(RetrieverFailed, match="from a thread"):
        retriever.search([query(np.ones(8, np.float32))], 5)


def test_a_search_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="at least 1 thread, not 0"):
        dense(np.ones((2, 2), np.float32), threads=0)


def test_encodes_only_what_has_no_vector() -> None:
    encoder = Words(2)
    retriever = ExactDense(documents(3), np.eye(3, 2, dtype=np.float32), encoder)
    kept = query(np.array([5, 6], dtype=np.float32))
    fresh, same_object = retriever.encode([Query(text="1 2"), kept])
    assert fresh.vector is not None
    assert fresh.vector.tolist() == [1, 2]
    assert same_object is kept
    assert retriever.encode([kept]) == [kept]
    assert encoder.asked == ["1 2"]


def test_rows_are_copies_and_documents_are_the_passages() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    retriever = dense(vectors)
    rows = retriever.rows(np.array([2, 0, 2]))
    assert rows.tolist() == [[6, 7, 8], [0, 1, 2], [6, 7, 8]]
    rows[:] = 0
    assert retriever.rows(np.array([2])).tolist() == [[6, 7, 8]]
    assert retriever.rows(np.array([], dtype=np.int64)).shape == (0, 3)
    assert retriever.document(3) == Document(3, "title 3", "text 3")
    assert len(retriever) == 4
    assert retriever.concurrency == 1


@pytest.mark.parametrize("ids", [[-1], [0, 4]])
def test_rows_of_documents_that_are_not_there_are_refused(ids: list[int]) -> None:
    with pytest.raises(BadKnowledge, match="there are 4"):
        dense(np.eye(4, dtype=np.float32)).rows(np.array(ids))


def test_no_queries_no_rankings_and_k_beyond_the_corpus() -> None:
    retriever = dense(np.eye(3, dtype=np.float32))
    assert retriever.search([], 5) == []
    (ranking,) = retriever.search([query(np.array([0, 1, 0], dtype=np.float32))], 50)
    assert ranking.ids.tolist() == [1, 0, 2]
    assert ranking.ids.dtype == np.int64
    assert ranking.scores.dtype == np.float32
    with pytest.raises(ValueError, match="at least 1"):
        retriever.search([query(np.ones(3, np.float32))], 0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "vector", [None, [1, NAN, 0], [1, INF, 0], [-INF, 1, 0], [1, 2], [[1, 2, 3]], [3e38, 3e38, 3e38]]
)
def test_a_query_that_cannot_be_scored_is_refused_everywhere(vector: list[float] | None, metric: Metric) -> None:
    retriever = dense(np.ones((400, 3), dtype=np.float32), metric=metric)
    bad = Query(text="bad", vector=None if vector is None else np.array(vector, dtype=np.float32))
    with pytest.raises(RetrieverFailed):
        retriever.search([query(np.ones(3, np.float32)), bad], 1)
    with pytest.raises(RetrieverFailed):
        retriever.score(bad, np.ones((2, 3), np.float32))
    if vector is not None:
        with pytest.raises(RetrieverFailed):
            retriever.encode([bad])


@pytest.mark.parametrize(("stored", "asked"), [(1.0, 9.9e18), (9.9e18, 1.0), (4.9e18, -4.9e18), (-5e18, 4.9e18)])
def test_squared_distances_that_float32_could_not_hold_are_refused(stored: float, asked: float) -> None:
    """Lengths that together stay under 1e19 can be scored, and no search meets infinity; longer ones are refused."""
    vectors = np.full((400, 1), stored, np.float32)
    for threshold in (1, 1 << 30):
        (ranking,) = dense(vectors, metric="squared L2", blas_threshold=threshold).search(
            [query(np.array([asked], np.float32))], 3
        )
        assert ranking.ids.tolist() == [0, 1, 2]
        assert ranking.scores == pytest.approx(-((asked - stored) ** 2), rel=1e-6)
    longer = np.array([asked + np.sign(asked) * (1.1e19 - abs(stored) - abs(asked))], np.float32)
    with pytest.raises(RetrieverFailed, match="too long for float32"):
        dense(vectors, metric="squared L2").search([query(longer)], 3)


def test_an_encoder_that_answers_wrongly_is_reported() -> None:
    retriever = dense(np.ones((2, 3), dtype=np.float32))
    with pytest.raises(RetrieverFailed, match="not finite"):
        retriever.encode([Query(text="nan 1 2")])
    retriever._encoder.encode = lambda texts: np.ones((5, 3), np.float32)  # type: ignore[method-assign]
    with pytest.raises(RetrieverFailed, match="5 vectors for 1 texts"):
        retriever.encode([Query(text="x")])


def test_scoring_refuses_rows_of_another_width() -> None:
    with pytest.raises(RetrieverFailed, match=r"\[n, 3\], not \[2, 4\]"):
        dense(np.ones((2, 3), dtype=np.float32)).score(query(np.ones(3, np.float32)), np.ones((2, 4), np.float32))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.ones((3, 2), np.float32), "3 vectors for 4 passages"),
        (np.ones((4, 3), np.float32), "3 wide, the query encoder's 2"),
        (np.ones(8, np.float32), r"shape \[8\]"),
        (np.ones((4, 2), np.float64), "holds float64"),
        (np.array([[1, 1], [1, 1], [1, NAN], [1, 1]], np.float16), "vector 2 is not finite"),
        (np.array([[1, 1], [INF, 1], [1, NAN], [1, 1]], np.float32), "vector 1 is not finite"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(tmp_path: Path, stored: NDArray[Any], message: str) -> None:
    np.save(tmp_path / "bad.npy", stored)
    with pytest.raises(BadKnowledge, match=rf"bad\.npy: .*{message}"):
        ExactDense(documents(4), tmp_path / "bad.npy", Words(2))
    with pytest.raises(BadKnowledge, match=message):
        ExactDense(documents(4), stored, Words(2))


def test_embedding_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.npy"
    np.save(whole, np.ones((4, 2), np.float32))
    cut, text, empty, several, objects = (tmp_path / name for name in ("cut", "text", "empty", "several", "objects"))
    cut.write_bytes(whole.read_bytes()[:-4])
    text.write_text("no array")
    empty.write_bytes(b"")
    with several.open("wb") as file:
        np.savez(file, a=np.ones(2), b=np.ones(2))
    with objects.open("wb") as file:
        np.save(file, np.array([{}, None], dtype=object), allow_pickle=True)
    for path in (cut, text, empty, several, objects, tmp_path / "missing", tmp_path):
        with pytest.raises(BadKnowledge, match=f"^{path}: "):
            ExactDense(documents(4), path, Words(2))


def test_without_faiss_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[local\]'"):
        dense(np.ones((1, 1), np.float32))
