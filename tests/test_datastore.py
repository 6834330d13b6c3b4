"""An opened datastore: a text, its keys and retrievers over them; refused when a file is not the one that was built."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_datastore_build import Bytes
from test_manifest import mutate

from ralmspec.pipeline import BadKnowledge
from ralmspec.retrievers.base import Query
from ralmspec.retrievers.datastore import Datastore
from ralmspec.retrievers.datastore_build import DatastoreOptions, build_datastore
from ralmspec.retrievers.errors import RetrieverFailed
from ralmspec.retrievers.index import SearchOptions, open_index
from ralmspec.retrievers.index_build import build_index
from ralmspec.retrievers.index_parts import BuildOptions
from ralmspec.retrievers.manifest import Manifest

pytest.importorskip("faiss", reason="needs ralmspec[local]")

KINDS = ("exact", "hnsw", "ivf")
TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(150))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datastore")
    (folder / "text.txt").write_text(TEXT)
    options = DatastoreOptions(kinds=KINDS, window=30, context=9, ivf_lists=4)
    build_datastore([folder / "text.txt"], folder / "store", Bytes(), options)
    return folder / "store"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "copy")


def test_what_it_holds(built: Path) -> None:
    store = Datastore.open(built)
    assert bytes(store.tokens.tolist()) == TEXT.encode()
    assert len(store) == len(store.values) == len(TEXT) - 1
    assert store.tokens.dtype == np.int32 and (store.dimension, store.vocabulary) == (8, 256)
    assert np.shares_memory(store.values, store.tokens) and store.values[7] == store.tokens[8]
    assert not store.tokens.flags.writeable and not store.values.flags.writeable
    assert sorted(store.manifest.kinds) == sorted(KINDS)


def test_a_document_is_what_came_before_and_the_token(built: Path) -> None:
    bare, decoded = Datastore.open(built), Datastore.open(built, decode=lambda tokens: bytes(tokens).decode())
    entry = decoded.retriever().document(1000)
    assert (entry.id, entry.title) == (1000, "entry 1,000")
    assert entry.text == f"{TEXT[969:1001]} → {TEXT[1001]}"
    assert decoded.retriever().document(0).text == f"{TEXT[0]} → {TEXT[1]}"
    last = len(decoded) - 1
    assert decoded.retriever().document(last).text.endswith("149 is 22201. → \n")
    assert bare.retriever().document(1).text == f"{ord(TEXT[0])} {ord(TEXT[1])} → {ord(TEXT[2])}"
    for absent in (-1, len(decoded)):
        with pytest.raises(BadKnowledge, match=f"no entry {absent}; the datastore has 0 to {last}"):
            decoded.retriever().document(absent)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_come_with_their_key(built: Path, kind: str) -> None:
    retriever = Datastore.open(built).retriever(kind, SearchOptions(ef_search=32, probes=4, depth=20))
    key = retriever.rows(np.array([1234]))[0]
    (query,) = retriever.encode([Query(text="", vector=key)])
    (ranking,) = retriever.search([query], 50)
    assert 1234 in ranking.ids and ranking.scores[0] == 0
    if kind != "exact":
        assert len(ranking.ids) == (32 if kind == "hnsw" else 20), "no more than the options allow"
    with pytest.raises(RetrieverFailed, match=r"came as text alone \('who'\)"):
        retriever.encode([query, Query(text="who")])
    with pytest.raises(RetrieverFailed, match=r"must be \[8\]"):
        retriever.encode([Query(text="", vector=key[:5])])
    assert "squared L2" in retriever.description


@pytest.mark.parametrize("memory", ["map", "copy", "float32"])
def test_wherever_keys_lie_the_ranking_is_the_same(built: Path, memory: str) -> None:
    store = Datastore.open(built, memory=memory)  # type: ignore[arg-type]
    assert store.keys.kind == ("float32" if memory == "float32" else "float16")
    retriever, reference = store.retriever(), Datastore.open(built).retriever()
    query = Query(text="", vector=np.linspace(-0.3, 0.4, 8, dtype=np.float32))
    (found,), (expected,) = retriever.search([query], 25), reference.search([query], 25)
    assert found.ids.tolist() == expected.ids.tolist() and found.scores.tolist() == expected.scores.tolist()


def test_a_kind_that_was_not_built_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    build_datastore([tmp_path / "text.txt"], tmp_path / "store", Bytes(), DatastoreOptions(max_entries=50))
    store = Datastore.open(tmp_path / "store")
    with pytest.raises(BadKnowledge, match="store: was built without hnsw; it has exact"):
        store.retriever("hnsw")
    with pytest.raises(BadKnowledge, match="a datastore is searched by exact, hnsw, ivf, not 'bm25'"):
        store.retriever("bm25")


def test_an_index_is_not_opened_as_a_datastore_nor_a_datastore_as_an_index(built: Path, tmp_path: Path) -> None:
    (tmp_path / "passages.jsonl").write_text('{"text": "alpha"}\n')
    build_index(tmp_path / "passages.jsonl", tmp_path / "index", BuildOptions(kinds=("bm25",)))
    with pytest.raises(BadKnowledge, match="index: is an index folder, not a datastore"):
        Datastore.open(tmp_path / "index")
    with pytest.raises(BadKnowledge, match="store: is a datastore of KNN-LM, not an index folder"):
        open_index(built, "exact")
    with pytest.raises(BadKnowledge, match="no datastore of KNN-LM; make one with `ralmspec knn build`"):
        Datastore.open(tmp_path / "nowhere")


def test_every_mutated_file_is_refused_by_name(copy: Path) -> None:
    generator = random.Random(0)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    assert {path.parent.name for path in files} == {"copy", "tokens", "keys", "hnsw", "ivf"}
    contents = {path: path.read_bytes() for path in files}
    refused = 0
    while refused < 300:
        path = generator.choice(files)
        mutated = mutate(contents[path], generator)
        if mutated == contents[path]:
            continue
        path.write_bytes(mutated)
        kind = path.parent.name if path.parent.name in KINDS else "exact"
        with pytest.raises(BadKnowledge) as error:
            Datastore.open(copy).retriever(kind)
        assert str(path) in str(error.value)
        path.write_bytes(contents[path])
        refused += 1
    Datastore.open(copy).retriever("hnsw")


@pytest.mark.parametrize("name", ["tokens/tokens.npy", "keys/keys.npy", "hnsw/graph.faiss", "ivf/lists.faiss"])
def test_a_missing_and_an_extra_file_are_named(copy: Path, name: str) -> None:
    kind = name.split("/")[0] if name.split("/")[0] in KINDS else "exact"
    (copy / name).with_name("more").write_bytes(b"x")
    with pytest.raises(BadKnowledge, match="more: does not belong to the datastore"):
        Datastore.open(copy).retriever(kind)
    (copy / name).with_name("more").unlink()
    (copy / name).unlink()
    with pytest.raises(BadKnowledge, match=f"{name}: is missing; build the datastore again"):
        Datastore.open(copy).retriever(kind)


def test_files_that_do_not_fit_each_other_are_refused_though_their_checksums_do(copy: Path) -> None:
    """As a faulty build would leave them: sealed, but wrong."""
    manifest = Manifest.read(copy, "datastore")
    manifest.model_copy(update={"documents": manifest.documents - 1}).save(copy)
    with pytest.raises(BadKnowledge, match="tokens, but .* entries; build the datastore again"):
        Datastore.open(copy)
    manifest.model_copy(update={"encoder": None}).save(copy)
    with pytest.raises(BadKnowledge, match="names no model"):
        Datastore.open(copy)
    assert manifest.encoder is not None
    wider = manifest.encoder.model_copy(update={"dimension": 9})
    manifest.model_copy(update={"encoder": wider}).save(copy)
    with pytest.raises(BadKnowledge, match=r"keys\.npy"):
        Datastore.open(copy)
