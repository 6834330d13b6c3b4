"""IVFDense: exact in the lists it looks into, whatever the batch, k or threads; wrong and damaged files refused."""

import importlib.util
import os
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

from ralmspec.retrievers.base import Query, Ranking
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.errors import BadKnowledge, MissingExtra, RetrieverFailed
from ralmspec.retrievers.ivf import IVFDense
from ralmspec.retrievers.vectors import Kind, Metric, Vectors

if importlib.util.find_spec("faiss") is None:
    pytest.skip("needs faiss (the extra 'local')", allow_module_level=True)

DEMO = Path(__file__).parent.parent / "examples" / "demo" / "embeddings_wikipedia_minilm_f16.npy"

Built = Callable[..., tuple[Any, Path]]


def lists_of(index: Any) -> list[NDArray[np.int64]]:
    """The ids in each list."""
    import faiss

    lists = index.invlists
    return [
        faiss.rev_swig_ptr(lists.get_ids(one), lists.list_size(one)).copy()
        if lists.list_size(one)
        else np.empty(0, int)
        for one in range(index.nlist)
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Stored vectors of a kind, for a metric, and the lists of them."""
    folder = tmp_path_factory.mktemp("ivf")

    @cache
    def make(kind: Kind, metric: Metric = "inner product") -> tuple[Any, Path]:
        path = folder / f"{kind} {metric}"
        IVFDense.build(vectors := stored(kind, metric), path, lists=40)
        return vectors, path

    return make


def opened(made: tuple[Any, Path], **options: Any) -> IVFDense:
    vectors, path = made
    passages, width = served(vectors)
    return IVFDense(passages, vectors, path, width, **options)


@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 16),
    k=st.sampled_from([1, 4, 20, 300, 2000]),
    probes=st.sampled_from([1, 3, 10]),
    kind=st.sampled_from(KINDS),
    metric=st.sampled_from(METRICS),
    threads=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_a_search_ranks_the_nearest_lists_by_the_one_kernel(
    built: Built, seed: int, batch: int, k: int, probes: int, kind: Kind, metric: Metric, threads: int
) -> None:
    """By definition, and so independent of batch, k and threads."""
    import faiss

    retriever = opened(built(kind, metric), probes=probes, threads=threads, depth=2000)
    index: Any = faiss.read_index(str(built(kind, metric)[1]))
    centroids, contents = index.quantizer.reconstruct_n(0, index.nlist), lists_of(index)
    asked = queries(batch, seed=seed)
    for query, ranking in zip(asked, retriever.search(asked, k), strict=True):
        near = retriever.score(query, centroids)
        filled = [one for one in range(index.nlist) if len(contents[one])]
        lists = sorted(filled, key=lambda one: (-near[one], one))[:probes]
        held = np.sort(np.concatenate([contents[one] for one in lists]))
        scores = retriever.score(query, retriever.rows(held))
        order = np.lexsort((held, -scores))[:k]
        assert same(ranking, Ranking(held[order], scores[order]))
        assert len(ranking.ids) >= 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 5, 40])
def test_the_ranking_for_k_begins_the_ranking_for_more(built: Built, kind: Kind, metric: Metric, depth: int) -> None:
    """Equal scores abound at every cut; neither k nor the batch nor threads change what is found."""
    made = built(kind, metric)
    retriever, threaded = (opened(made, probes=7, depth=depth, threads=threads) for threads in (1, 3))
    asked = queries(20)
    whole = retriever.search(asked, 1000)
    assert all(1 <= len(ranking.ids) <= depth for ranking in whole)
    for k in (1, 3, 40):
        for number, query in enumerate(asked):
            assert same(retriever.search([query], k)[0], whole[number].top(k))
        for found, all_of_it in zip(threaded.search(asked, k), whole, strict=True):
            assert same(found, all_of_it.top(k))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_lists_together_are_the_exact_index_bit_for_bit(built: Built, kind: Kind, metric: Metric) -> None:
    vectors, path = built(kind, metric)
    everywhere = opened((vectors, path), probes=10_000, depth=1200, threads=2)
    assert everywhere.description.startswith(f"IVF, {Vectors.open(vectors).description}, faiss, 40 lists,")
    exact = ExactDense(documents(len(vectors)), vectors, encoder(16))
    for k in (1, 30, 1200):
        for found, true in zip(everywhere.search(queries(10), k), exact.search(queries(10), k), strict=True):
            assert same(found, true)


def test_on_real_passages_the_first_document_is_mostly_the_true_one(tmp_path: Path) -> None:
    vectors = np.load(DEMO)[:2000]
    IVFDense.build(vectors, tmp_path / "index")
    asked = [Query(text="q", vector=vector) for vector in np.load(DEMO)[2000:2200].astype(np.float32)]
    lists = IVFDense(documents(2000), vectors, tmp_path / "index", encoder(384), probes=32)
    exact = ExactDense(documents(2000), vectors, encoder(384))
    pairs = list(zip(lists.search(asked, 1), exact.search(asked, 1), strict=True))
    assert sum(bool(found.ids[0] == true.ids[0]) for found, true in pairs) >= 185
    assert lists.description == "IVF, 2,000 x 384 float16, faiss, 179 lists, 32 searched"


@pytest.mark.parametrize(("n", "lists"), [(1, None), (1, 1), (2, 50), (300, 300), (300, None), (300, 1)])
def test_every_vector_is_in_one_list_and_a_search_finds_some(tmp_path: Path, n: int, lists: int | None) -> None:
    import faiss

    vectors = some()[:n]
    IVFDense.build(vectors, tmp_path / "index", lists=lists)
    contents = lists_of(faiss.read_index(str(tmp_path / "index")))
    assert sorted(np.concatenate(contents).tolist()) == list(range(n))
    assert len(contents) <= (lists or 70)
    for ranking in opened((vectors, tmp_path / "index"), probes=1).search(queries(20), 3):
        assert 1 <= len(ranking.ids) <= 3


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_arguments_make_the_same_bytes(tmp_path: Path, metric: Metric) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        IVFDense.build(stored("float32", metric), tmp_path / name, seed=seed)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()


def test_a_build_tells_how_far_it_is_and_may_be_stopped(tmp_path: Path) -> None:
    told: list[int] = []

    def tell(done: int, total: int) -> None:
        assert total == 1200
        assert not (tmp_path / "index").exists() or done == 1200
        told.append(done)

    IVFDense.build(some(), tmp_path / "index", tell=tell)
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, 1200)
    assert len(set(told)) > 1

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        IVFDense.build(some(), tmp_path / "stopped", tell=stop)
    assert os.listdir(tmp_path) == ["index"]


def test_an_index_of_other_vectors_is_refused_by_name(tmp_path: Path, built: Built) -> None:
    import faiss

    _, path = built("float32")
    for vectors in (some()[:1100], some(dimension=8)):
        with pytest.raises(BadKnowledge, match=f"is of 1200 vectors of 16 numbers; these are {len(vectors)} of"):
            opened((vectors, path))
    by_distance = faiss.IndexIVFFlat(faiss.IndexFlatL2(16), 16, 4)
    by_distance.cp.min_points_per_centroid = 1
    by_distance.train(some())
    by_distance.add(some())
    faiss.write_index(by_distance, str(tmp_path / "index"))
    with pytest.raises(BadKnowledge, match="another metric"):
        opened((some(), tmp_path / "index"))


def test_an_index_for_another_metric_is_refused_by_name(built: Built) -> None:
    for metric, other in (METRICS, METRICS[::-1]):
        (vectors, _), (_, path) = built("float16", metric), built("float16", other)
        with pytest.raises(BadKnowledge, match=f"another metric than the {metric} of its vectors") as raised:
            opened((vectors, path))
        assert str(raised.value).startswith(f"{path}: ")


def test_centroids_are_of_unit_length_for_the_inner_product_only(built: Built) -> None:
    """By distance a centroid is the mean of its vectors; cut to length 1 it would be far from all of them."""
    import faiss

    for metric in METRICS:
        index: Any = faiss.read_index(str(built("float32", metric)[1]))
        lengths = np.linalg.norm(index.quantizer.reconstruct_n(0, index.nlist), axis=1)
        assert bool((abs(lengths - 1) < 1e-5).all()) == (metric == "inner product")


def test_files_that_are_no_such_index_are_refused_by_name(tmp_path: Path) -> None:
    import faiss

    faiss.write_index(faiss.IndexFlatIP(16), str(tmp_path / "faiss"))
    np.save(tmp_path / "array.npy", np.ones((4, 2)))
    (tmp_path / "text").write_text("no index")
    (tmp_path / "empty").write_bytes(b"")
    with (tmp_path / "other").open("wb") as file:
        np.savez(file, a=np.ones(2))
    for name in ("faiss", "array.npy", "text", "empty", "other", "missing", "."):
        with pytest.raises(BadKnowledge) as raised:
            opened((some(), tmp_path / name))
        assert str(raised.value).startswith(f"{tmp_path / name}: ")


def test_vectors_that_are_not_finite_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    vectors = some()
    vectors[1199, 15] = np.inf
    np.save(tmp_path / "vectors.npy", vectors)
    with pytest.raises(BadKnowledge, match=r"vectors\.npy: vector 1199 is not finite"):
        IVFDense.build(tmp_path / "vectors.npy", tmp_path / "index")
    assert os.listdir(tmp_path) == ["vectors.npy"]


def test_a_file_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BadKnowledge, match=r"nowhere/index: cannot be written"):
        IVFDense.build(some(), tmp_path / "nowhere" / "index")


@pytest.mark.parametrize("wrong", [{"lists": 0}, {"sample": 0}, {"iterations": 0}, {"threads": 0}])
def test_arguments_that_make_no_sense_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        IVFDense.build(some(), tmp_path / "index", **wrong)  # type: ignore[arg-type]


def test_a_search_looks_into_a_list_and_for_a_document(built: Built) -> None:
    for wrong in ({"probes": 0}, {"depth": 0}):
        with pytest.raises(ValueError, match="at least 1 list for at least 1 document"):
            opened(built("float32"), **wrong)
    retriever = opened(built("float32"), threads=2)
    assert retriever.search([], 5) == []
    with pytest.raises(ValueError, match="at least 1 document, not 0"):
        retriever.search([], 0)
    with pytest.raises(RetrieverFailed, match="has no vector"):
        retriever.search([Query(text="q")], 1)


def test_without_faiss_the_error_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match=r"IVFDense needs: pip install 'ralmspec\[local\]'"):
        opened((some(), tmp_path / "index"))
    with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[local\]'"):
        IVFDense.build(some(), tmp_path / "index")
