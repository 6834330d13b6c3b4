"""What the command line's options open: every setting reaches what it is for, and bad combinations are refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_datastore import knn_world
from fakes import FakeRetriever

from ralmspec.pipeline import BadKnowledge, Limits
from ralmspec.pipeline.engine import EngineOptions, choose_questions, open_engine
from ralmspec.pipeline.knn_engine import KnnOptions, open_knn_engine
from ralmspec.pipeline.thread_budget import ThreadBudget
from ralmspec.retrievers import corpus, datastore, dense, encoder, index, padded, passages
from ralmspec.retrievers.latency import SetLatency
from ralmspec.retrievers.questions import QuestionFolder
from ralmspec.stages import transformers_model


class Opened:
    """Stands in for everything that is loaded, and notes in which order and with what."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.made: dict[str, Any] = {"index": FakeRetriever(), "exact": FakeRetriever(), "padded": FakeRetriever()}

    def by(self, name: str) -> Any:
        def take(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            self.given[name] = arguments, options
            return self.made.setdefault(name, SimpleNamespace(name=name))

        return take


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    made = Opened()
    made.made["corpus"] = SimpleNamespace(passages="PASSAGES", embeddings="EMBEDDINGS")
    for name, owner, attribute in (
        ("model", transformers_model.TransformersModel, "load"),
        ("index", index, "open_index"),
        ("encoder", encoder, "open_encoder"),
        ("passages", passages, "Passages"),
        ("exact", dense, "ExactDense"),
        ("padded", padded, "PaddedDense"),
        ("corpus", corpus.Corpus, "find"),
    ):
        monkeypatch.setattr(owner, attribute, made.by(name))
    monkeypatch.setattr(ThreadBudget, "apply", lambda budget: made.by("threads")(budget))
    return made


def test_threads_are_told_before_anything_is_loaded(opened: Opened) -> None:
    open_engine(EngineOptions(model="m", data=Path("d"), model_threads=3, index_threads=2))
    assert opened.calls[0] == "threads"
    assert opened.given["threads"][0] == (ThreadBudget(model=3, index=2, jvm=2),)


def test_the_model_gets_its_device_its_precision_and_its_bounds(opened: Opened) -> None:
    options = EngineOptions(model="path", data=Path("d"), device="cuda:1", dtype="float64", max_batch=700, kv_mib=3)
    engine = open_engine(options)
    bounds = {"max_batch": 700, "pass_tokens": 700, "kv_bytes": 3 << 20}
    assert opened.given["model"] == (("path",), {"device": "cuda:1", "dtype": "float64", **bounds})
    assert engine.model is opened.made["model"]


def test_an_index_is_searched_as_the_options_say(opened: Opened) -> None:
    engine = open_engine(
        EngineOptions(
            model="m", index=Path("i"), retriever="hnsw", memory="copy", ef_search=77, probes=9, index_threads=5
        )
    )
    (folder, kind, search), options = opened.given["index"]
    assert (folder, kind) == (Path("i"), "hnsw")
    assert (search.memory, search.ef_search, search.probes) == ("copy", 77, 9)
    assert (search.threads, search.jvm_threads) == (5, 5)
    assert options == {"encoder": None, "device": "cpu"}, "the manifest names the encoder"
    assert engine.retriever is engine.index is opened.made["index"]
    assert engine.questions is None
    assert engine.description == "fake"


@pytest.mark.parametrize(
    ("documents", "ef_search", "depth"), [(0, 77, 256), (100, 100, 256), (256, 256, 256), (1000, 1000, 1000)]
)
def test_an_index_is_searched_deep_enough_for_what_is_wanted(documents: int, ef_search: int, depth: int) -> None:
    search = EngineOptions(model="m", ef_search=77).search(documents=documents)
    assert (search.ef_search, search.depth) == (ef_search, depth)


@pytest.mark.parametrize(("prefetch", "deep"), [(1, 300), (300, 300), (512, 512)])
def test_a_datastore_is_searched_deep_enough_for_the_mixture_and_for_prefetch(
    prefetch: int, deep: int, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, neighbours, workload = knn_world()
    store: Any = workload.datastore
    opened.made |= {"model": model, "datastore": store, "entries": neighbours}
    store.retriever = opened.by("entries")
    monkeypatch.setattr(datastore.Datastore, "open", opened.by("datastore"))
    engine = open_knn_engine(
        KnnOptions(model="m", datastore=Path("s"), retriever="hnsw", top_k=300, ef_search=77), documents=prefetch
    )
    (kind, search), _ = opened.given["entries"]
    assert (kind, search.ef_search, search.depth) == ("hnsw", deep, deep)
    assert engine.index is neighbours and engine.limits.cached_documents == 16_384


def test_a_sessions_cache_is_as_large_as_asked_for(opened: Opened) -> None:
    assert open_engine(EngineOptions(model="m", data=Path("d"), cached_documents=77)).limits.cached_documents == 77
    assert open_engine(EngineOptions(model="m", data=Path("d"))).limits == Limits()


def test_an_encoder_of_ones_own_takes_the_place_of_the_manifest_s(opened: Opened) -> None:
    open_engine(EngineOptions(model="m", index=Path("i"), encoder="mine", device="cuda"))
    assert opened.given["encoder"] == (("mine",), {"device": "cuda"})
    assert opened.given["index"][1] == {"encoder": opened.made["encoder"], "device": "cuda"}


def test_an_index_goes_before_data_which_then_gives_the_questions(opened: Opened) -> None:
    engine = open_engine(EngineOptions(model="m", index=Path("i"), data=Path("d")))
    assert engine.index is opened.made["index"]
    assert "exact" not in opened.calls and "corpus" not in opened.calls
    assert engine.questions == QuestionFolder(Path("d"))


def test_data_are_searched_exactly(opened: Opened) -> None:
    engine = open_engine(EngineOptions(model="m", data=Path("d"), corpus="c", index_threads=4, device="cuda"))
    assert opened.given["corpus"] == ((Path("d"), "c"), {})
    assert opened.given["encoder"] == (("minilm",), {"device": "cuda"})
    assert opened.given["passages"] == (("PASSAGES",), {})
    parts = opened.made["passages"], "EMBEDDINGS", opened.made["encoder"]
    assert opened.given["exact"] == (parts, {"scan": "codes", "threads": 4})
    assert engine.retriever is engine.index is opened.made["exact"]
    assert engine.questions == QuestionFolder(Path("d"))


def test_data_may_be_padded_and_encoded_by_another_encoder(opened: Opened) -> None:
    engine = open_engine(EngineOptions(model="m", data=Path("d"), pad_to=900, encoder="other", index_threads=4))
    assert opened.given["encoder"][0] == ("other",)
    parts = opened.made["passages"], "EMBEDDINGS", opened.made["encoder"]
    assert opened.given["padded"] == (parts, {"pad_to": 900, "scan": "codes", "threads": 4})
    assert engine.index is opened.made["padded"]


def test_a_set_latency_stands_before_the_index_and_not_in_its_place(opened: Opened) -> None:
    options = EngineOptions(model="m", data=Path("d"), retriever_latency=0.25, retriever_concurrency=3)
    engine = open_engine(options)
    assert isinstance(engine.retriever, SetLatency)
    assert (engine.retriever.seconds, engine.retriever.concurrency) == (0.25, 3)
    assert engine.index is opened.made["exact"]
    assert "simulated latency" in engine.description


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give an index folder as --index, or a data folder as --data"),
        ({"data": Path("d"), "retriever": "ivf"}, "--kinds ivf"),
        ({"index": Path("i"), "pad_to": 5}, "use --pad-to with --data alone"),
    ],
)
def test_bad_combinations_are_refused_before_anything_is_read(
    options: dict[str, Any], says: str, opened: Opened
) -> None:
    with pytest.raises(BadKnowledge, match=says):
        open_engine(EngineOptions(model="m", **options))
    assert opened.calls == ["threads"]


def test_a_report_names_folders_and_not_where_they_lie() -> None:
    facts = EngineOptions(model="m", data=Path("/private/home/data"), index=Path("/private/ix"), probes=3).facts()
    assert (facts["data"], facts["index"], facts["probes"]) == ("data", "ix", 3)
    assert EngineOptions(model="m").facts()["data"] is None
    json.dumps(facts)


def test_questions_are_the_first_of_every_set(tmp_path: Path) -> None:
    for name in ("one", "two"):
        lines = [json.dumps({"id": n, "question": f"{name} {n}", "answers": []}) for n in range(3)]
        (tmp_path / f"questions_{name}.jsonl").write_text("\n".join(lines) + "\n")
    folder = QuestionFolder(tmp_path)
    chosen = choose_questions(folder, ["two", "one"], 2)
    assert [(name, question.question) for name, question in chosen] == [
        ("two", "two 0"), ("two", "two 1"), ("one", "one 0"), ("one", "one 1"),
    ]  # fmt: skip
    assert len(choose_questions(folder, ["one"], 100)) == 3
    with pytest.raises(BadKnowledge, match="no question was chosen; sets here: one, two"):
        choose_questions(folder, [], 2)
    with pytest.raises(BadKnowledge, match="three"):
        choose_questions(folder, ["three"], 2)
    with pytest.raises(BadKnowledge, match="give the folder that holds"):
        choose_questions(None, ["one"], 2)
