"""HNSWDense: one answer whatever the batch, k or threads; the one kernel's scores; builds that go on after a kill."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import KINDS, METRICS, documents, encoder, queries, same, served, some, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ralmspec.retrievers.base import Document, Query
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.errors import BadKnowledge, MissingExtra, RetrieverFailed
from ralmspec.retrievers.hnsw import HNSWDense
from ralmspec.retrievers.vectors import Kind, Metric, Vectors

if importlib.util.find_spec("faiss") is None:
    pytest.skip("needs faiss (the extra 'local')", allow_module_level=True)

DEMO = Path(__file__).parent.parent / "examples" / "demo" / "embeddings_wikipedia_minilm_f16.npy"
SMALL: dict[str, Any] = {"m": 8, "ef_construction": 40, "chunk": 250, "checkpoint": 250}

Built = Callable[..., tuple[Any, Path]]


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Stored vectors of a kind, for a metric, and the graph over them."""
    folder = tmp_path_factory.mktemp("hnsw")

    @cache
    def make(kind: Kind, metric: Metric = "inner product") -> tuple[Any, Path]:
        path = folder / f"{kind} {metric}"
        HNSWDense.build(vectors := stored(kind, metric), path, **SMALL)
        return vectors, path

    return make


def opened(made: tuple[Any, Path], **options: Any) -> HNSWDense:
    vectors, path = made
    passages, width = served(vectors)
    return HNSWDense(passages, vectors, path, width, **options)


@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 16),
    k=st.sampled_from([1, 4, 20, 64, 300]),
    kind=st.sampled_from(KINDS),
    metric=st.sampled_from(METRICS),
    threads=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_batch_k_and_threads_change_no_bit_of_any_ranking(
    built: Built, seed: int, batch: int, k: int, kind: Kind, metric: Metric, threads: int
) -> None:
    made = built(kind, metric)
    alone, together = opened(made, ef_search=64), opened(made, ef_search=64, threads=threads)
    asked = queries(batch, seed=seed)
    for query, ranking in zip(asked, together.search(asked, k), strict=True):
        assert same(alone.search([query], 1000)[0].top(k), ranking)
        assert len(ranking.ids) == min(k, 64)
        assert ranking.scores.tobytes() == together.score(query, together.rows(ranking.ids)).tobytes()
        order = np.lexsort((ranking.ids, -ranking.scores))
        assert order.tolist() == list(range(len(order)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_search_of_a_small_corpus_is_exact(built: Built, kind: Kind, metric: Metric) -> None:
    vectors, path = built(kind, metric)
    wide = opened((vectors, path), ef_search=5000)
    assert wide.description.startswith(f"HNSW, {Vectors.open(vectors).description}, faiss, M 8,")
    exact = ExactDense(documents(len(vectors)), vectors, encoder(16), memory="map")
    found = wide.search(queries(10), 5000)
    reached = [len(ranking.ids) for ranking in found]
    assert min(reached) > 1150  # duplicates can cut a few vectors off from the graph, and nothing else
    for ranking, true in zip(found, exact.search(queries(10), 20), strict=True):
        assert same(ranking.top(5), true.top(5))


def test_on_real_passages_the_first_document_is_nearly_always_the_true_one(tmp_path: Path) -> None:
    vectors = np.load(DEMO)[:2000]
    HNSWDense.build(vectors, tmp_path / "index", m=16, ef_construction=60)
    asked = [Query(text="q", vector=vector) for vector in np.load(DEMO)[2000:2200].astype(np.float32)]
    graph = HNSWDense(documents(2000), vectors, tmp_path / "index", encoder(384), ef_search=64)
    exact = ExactDense(documents(2000), vectors, encoder(384))
    pairs = list(zip(graph.search(asked, 1), exact.search(asked, 1), strict=True))
    assert sum(bool(found.ids[0] == true.ids[0]) for found, true in pairs) >= 195
    assert graph.description == "HNSW, 2,000 x 384 float16, faiss, M 16, efConstruction 60, efSearch 64"


def test_the_index_holds_the_graph_only_and_the_vectors_are_shared(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).standard_normal((500, 256), dtype=np.float32))
    shared = Vectors.open(tmp_path / "vectors.npy")
    HNSWDense.build(shared, tmp_path / "index", **SMALL)
    assert (tmp_path / "index").stat().st_size < 500 * (8 * 8 + 60)
    graph = HNSWDense(documents(500), shared, tmp_path / "index", encoder(256))
    assert graph._vectors is shared
    assert not graph._storage.codes.is_owned
    assert isinstance(shared.stored.base, np.memmap)
    assert graph.search(queries(3, 256), 4)[2].ids.shape == (4,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("every", "metric"), [(1, "inner product"), (2, "inner product"), (3, "inner product"), (2, "squared L2")]
)
def test_a_build_that_is_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, built: Built, kind: Kind, every: int, metric: Metric
) -> None:
    """Five chunks, killed after each `every` of them, with checkpoints after the first, second, third and fourth."""
    vectors, whole = built(kind, metric)
    path = tmp_path / "index"
    runs: list[list[int]] = []

    def tell(done: int, total: int) -> None:
        assert total == len(vectors)
        assert path.exists() == (done == total)
        runs[-1].append(done)
        if len(runs[-1]) > every and done < total:
            raise Killed

    while not path.exists():
        runs.append([])
        try:
            HNSWDense.build(vectors, path, **SMALL, tell=tell)
        except Killed:
            # What a kill in the middle of writing the next checkpoint leaves behind.
            (tmp_path / "index.checkpoint.new").write_bytes(b"half a graph")
    reported = [done for run in runs for done in run[bool(runs.index(run)) :]]
    assert reported == [0, 250, 500, 750, 1000, 1200]
    assert path.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "index.checkpoint").exists()


def test_a_build_whose_process_dies_goes_on_in_another(tmp_path: Path, built: Built) -> None:
    vectors, whole = built("float16")
    np.save(tmp_path / "vectors.npy", vectors)
    program = f"""
import os, sys
from ralmspec.retrievers.hnsw import HNSWDense
def tell(done, total):
    print(done, flush=True)
    if done == 750 and sys.argv[1] == "die":
        os.kill(os.getpid(), 9)
HNSWDense.build(sys.argv[2], sys.argv[3], **{SMALL}, tell=tell)
"""
    arguments = [sys.executable, "-c", program]
    files = [str(tmp_path / "vectors.npy"), str(tmp_path / "index")]
    first = subprocess.run([*arguments, "die", *files], stdout=subprocess.PIPE, check=False)
    assert (first.returncode, first.stdout.split()) == (-9, [b"0", b"250", b"500", b"750"])
    assert sorted(os.listdir(tmp_path)) == ["index.checkpoint", "vectors.npy"]
    second = subprocess.run([*arguments, "live", *files], stdout=subprocess.PIPE, check=True)
    assert second.stdout.split() == [b"750", b"1000", b"1200"]
    assert (tmp_path / "index").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "change", [{"m": 9}, {"ef_construction": 41}, {"seed": 1}, {"chunk": 125}, "vectors", "kind", "metric"]
)
def test_a_checkpoint_of_another_build_is_refused(tmp_path: Path, change: Any) -> None:
    def tell(done: int, total: int) -> None:
        if done == 500:
            raise Killed

    vectors = some()
    with pytest.raises(Killed):
        HNSWDense.build(vectors, tmp_path / "index", **SMALL, tell=tell)
    options: dict[str, Any] = SMALL | change if isinstance(change, dict) else SMALL
    other: NDArray[Any] | Vectors = vectors
    if change == "kind":
        other = vectors.astype(np.float16)
    elif change == "vectors":
        other = vectors + (np.arange(len(vectors)) == 17)[:, np.newaxis].astype(np.float32)
    elif change == "metric":
        other = Vectors.open(vectors, metric="squared L2")
    with pytest.raises(BadKnowledge, match=r"index\.checkpoint: was left by a build with other arguments, vectors"):
        HNSWDense.build(other, tmp_path / "index", **options)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, built: Built) -> None:
    vectors, whole = built("float32")

    def tell(done: int, total: int) -> None:
        if done == 500:
            raise Killed

    with pytest.raises(Killed):
        HNSWDense.build(vectors, tmp_path / "index", **SMALL, tell=tell)
    checkpoint = tmp_path / "index.checkpoint"
    good, random = checkpoint.read_bytes(), np.random.default_rng(0)
    damaged = [good[:cut] for cut in [0, 1, 100, len(good) // 2, len(good) - 1]] + [good + b" ", good + b"\n"]
    for _ in range(60):
        flipped = bytearray(good)
        at = int(random.integers(len(good) - 700 if random.random() < 0.5 else 0, len(good)))
        flipped[at] ^= 1 << int(random.integers(8))
        damaged.append(bytes(flipped))
    for bad in damaged:
        checkpoint.write_bytes(bad)
        try:
            HNSWDense.build(vectors, tmp_path / "index", **SMALL)
        except BadKnowledge as error:
            assert str(checkpoint) in str(error)
        else:  # a space after the JSON, or the like
            assert (tmp_path / "index").read_bytes() == whole.read_bytes()
    checkpoint.write_bytes(good)
    HNSWDense.build(vectors, tmp_path / "index", **SMALL)
    assert (tmp_path / "index").read_bytes() == whole.read_bytes()


def test_checkpoints_come_less_often_as_the_graph_grows(tmp_path: Path) -> None:
    """Each writes the whole graph: every time an eighth more, all of them together write some nine graphs."""
    seen: list[int] = []

    def tell(done: int, total: int) -> None:
        stamp = (tmp_path / "index.checkpoint").stat().st_mtime_ns if done and done < total else 0
        if stamp and stamp not in stamps:
            stamps.add(stamp)
            seen.append(done)

    stamps: set[int] = set()
    HNSWDense.build(some(4000, 4), tmp_path / "index", m=2, ef_construction=2, chunk=20, checkpoint=20, tell=tell)
    assert seen[:5] == [20, 40, 60, 80, 100]
    assert 25 < len(seen) < 60
    assert all(after - before >= before // 8 for before, after in zip(seen, seen[1:], strict=False))


def test_seeds_and_threads_make_other_graphs_that_serve_as_well(tmp_path: Path) -> None:
    vectors, asked = some(), queries(30)
    exact = [ranking.scores[0] for ranking in ExactDense(documents(1200), vectors, encoder(16)).search(asked, 1)]
    graphs = set()
    made: dict[str, dict[str, Any]] = {"one": {}, "other": {"seed": 1}, "two": {"threads": 2}}
    for name, options in made.items():
        HNSWDense.build(vectors, tmp_path / name, **SMALL, **options)
        graphs.add((tmp_path / name).read_bytes())
        found = opened((vectors, tmp_path / name)).search(asked, 1)
        assert sum(ranking.scores[0] == true for ranking, true in zip(found, exact, strict=True)) >= 29
    assert len(graphs) >= 2


@pytest.mark.parametrize(("metric", "score"), [("inner product", 6.0), ("squared L2", -5.0)])
def test_one_passage_is_found(tmp_path: Path, metric: Metric, score: float) -> None:
    vectors = Vectors.open(np.ones((1, 3), np.float32), metric=metric)
    HNSWDense.build(vectors, tmp_path / "index")
    retriever = opened((vectors, tmp_path / "index"))
    (ranking,) = retriever.search([Query(text="q", vector=np.array([1, 2, 3], np.float32))], 5)
    assert (ranking.ids.tolist(), ranking.scores.tolist()) == ([0], [score])
    assert retriever.document(0) == Document(0, "title 0", "text 0")
    assert retriever.search([], 5) == []
    with pytest.raises(ValueError, match="at least 1 document, not 0"):
        retriever.search([], 0)
    with pytest.raises(RetrieverFailed, match="not finite"):
        retriever.search([Query(text="q", vector=np.array([1, np.nan, 3], np.float32))], 1)


def test_an_index_for_another_metric_is_refused_by_name(built: Built) -> None:
    for metric, other in (METRICS, METRICS[::-1]):
        (vectors, _), (_, path) = built("float16", metric), built("float16", other)
        with pytest.raises(BadKnowledge, match=f"another metric than the {metric} of its vectors") as raised:
            opened((vectors, path))
        assert str(raised.value).startswith(f"{path}: ")


def test_files_that_are_no_such_graph_are_refused_by_name(tmp_path: Path, built: Built) -> None:
    import faiss

    vectors, whole = built("float32")
    indexes: dict[str, Any] = {
        "flat": faiss.IndexFlatIP(16),
        "with vectors": faiss.IndexHNSWFlat(16, 8, faiss.METRIC_INNER_PRODUCT),
        "other metric": faiss.IndexHNSWFlat(16, 8),
    }
    for name, index in indexes.items():
        index.add(vectors)
        flags: Any = faiss.IO_FLAG_SKIP_STORAGE if name == "other metric" else 0
        file: Any = str(tmp_path / name)
        faiss.write_index(index, file, flags)
    HNSWDense.build(vectors[:-1], tmp_path / "fewer", **SMALL)
    HNSWDense.build(vectors[:, :8].copy(), tmp_path / "narrower", **SMALL)
    (tmp_path / "text").write_text("no index")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-100])
    messages = {
        "flat": "no index that HNSWDense.build writes",
        "with vectors": "no index that HNSWDense.build writes",
        "other metric": "another metric than the inner product",
        "fewer": "is of 1199 vectors of 16 numbers; these are 1200 of 16",
        "narrower": "is of 1200 vectors of 8 numbers; these are 1200 of 16",
        "text": "no index that faiss can read",
        "empty": "no index that faiss can read",
        "cut": "no index that faiss can read",
        "missing": "there is no such file",
        ".": "there is no such file",
    }
    for name, message in messages.items():
        with pytest.raises(BadKnowledge, match=message) as raised:
            opened((vectors, tmp_path / name))
        assert str(raised.value).startswith(f"{tmp_path / name}: ")


def test_vectors_that_are_not_finite_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    vectors = some()
    vectors[1199, 15] = np.nan
    np.save(tmp_path / "vectors.npy", vectors)
    with pytest.raises(BadKnowledge, match=r"vectors\.npy: vector 1199 is not finite"):
        HNSWDense.build(tmp_path / "vectors.npy", tmp_path / "index", **SMALL)
    assert os.listdir(tmp_path) == ["vectors.npy"]


def test_a_file_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BadKnowledge, match=r"nowhere/index: cannot be written"):
        HNSWDense.build(some(), tmp_path / "nowhere" / "index", **SMALL | {"checkpoint": 10_000})


@pytest.mark.parametrize("wrong", [{"m": 1}, {"ef_construction": 0}, {"threads": 0}, {"chunk": 0}, {"checkpoint": 0}])
def test_arguments_that_make_no_sense_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        HNSWDense.build(some(), tmp_path / "index", **SMALL | wrong)


def test_a_search_holds_a_candidate(built: Built) -> None:
    with pytest.raises(ValueError, match="at least 1 candidate, not 0"):
        opened(built("float32"), ef_search=0)


def test_without_faiss_the_error_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match=r"HNSWDense needs: pip install 'ralmspec\[local\]'"):
        opened((some(), tmp_path / "index"))
    with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[local\]'"):
        HNSWDense.build(some(), tmp_path / "index")
