"""DPR's encoders give what transformers' own classes give, from small random models: real weights are not at hand."""

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ralmspec.retrievers.base import Document, Query
from ralmspec.retrievers.dpr import DPRContextEncoder, DPRQuestionEncoder, sides
from ralmspec.retrievers.encoder import open_encoder, open_passage_encoder
from ralmspec.retrievers.errors import BadKnowledge, MissingExtra

LOCAL = importlib.util.find_spec("transformers") is not None and importlib.util.find_spec("torch") is not None
FAISS = importlib.util.find_spec("faiss") is not None
needs_local = pytest.mark.skipif(not LOCAL, reason="needs the extra 'local'")

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "a",
    "of",
    "is",
    "in",
    "who",
    "wrote",
    "where",
    "##s",
]
VOCABULARY += ["river", "paris", "Paris", "france", "book", "first", "long", "capital", "author", "city", ".", "?", ","]
ID = {word: id for id, word in enumerate(VOCABULARY)}
QUESTIONS = ["who wrote the first book?", "", "where is paris", "the river " * 20, "Paris, the capital of france."]
PASSAGES = [
    Document(0, "paris", "paris is the capital of france."),
    Document(1, "the first book", "the author of the first book is in the city of paris."),
    Document(2, "", "a river is long"),
    Document(3, "a long river", "the rivers of france, " * 3),
    Document(4, "book", ""),
]


def make(folder: Path, side: str, *, seed: int, lower: bool = True, **settings: Any) -> Path:
    """One side of a DPR with random weights, drawn wide so that texts lie far apart."""
    import torch
    import transformers

    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.DPRConfig(**{**shape, "vocab_size": len(VOCABULARY), "initializer_range": 0.5, **settings})
    network = {"question": transformers.DPRQuestionEncoder, "context": transformers.DPRContextEncoder}[side]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network(config).save_pretrained(folder)
    transformers.BertTokenizer(vocab=ID, do_lower_case=lower).save_pretrained(folder)
    published = json.loads((folder / "tokenizer_config.json").read_text())
    published["tokenizer_class"] = "DPRQuestionEncoderTokenizer" if side == "question" else "DPRContextEncoderTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(published))
    return folder


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dpr") / "question", "question", seed=1)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("dpr") / "context", "context", seed=2)


def pieces(text: str) -> list[int]:
    """Word pieces of the texts above, by hand."""
    words = text.lower().replace("?", " ?").replace(",", " ,").replace(".", " .").replace("rivers", "river ##s").split()
    return [ID[word] for word in words]


def directly(folder: Path, side: str, ids: list[int]) -> NDArray[np.float32]:
    """What transformers gives for one sequence, [dimension]."""
    import torch
    import transformers

    network: Any = {"question": transformers.DPRQuestionEncoder, "context": transformers.DPRContextEncoder}[side]
    with torch.inference_mode():
        output = network.from_pretrained(folder).eval()(torch.tensor([[ID["[CLS]"], *ids, ID["[SEP]"]]]))
    vector: NDArray[np.float32] = output.pooler_output[0].numpy()
    return vector


# Vectors ------------------------------------------------------------------------------------------------------------


@needs_local
@pytest.mark.parametrize("projection", [0, 10])
def test_questions_have_the_vectors_of_transformers(tmp_path: Path, projection: int) -> None:
    folder = make(tmp_path / "question", "question", seed=3, projection_dim=projection)
    encoder = DPRQuestionEncoder(folder)
    vectors = encoder.encode(QUESTIONS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(QUESTIONS), encoder.dimension) == (len(QUESTIONS), projection or 24)
    for text, vector in zip(QUESTIONS, vectors, strict=True):
        np.testing.assert_array_equal(vector, directly(folder, "question", pieces(text)))
    assert encoder.encode([]).shape == (0, encoder.dimension)


@needs_local
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_passages_have_the_vectors_of_transformers(question: Path, context: Path, batch_size: int) -> None:
    encoder = DPRContextEncoder(context, question=question)
    vectors = encoder.encode_passages(PASSAGES, batch_size=batch_size)
    assert vectors.dtype == np.float32
    for passage, vector in zip(PASSAGES, vectors, strict=True):
        title = [*pieces(passage.title), ID["[SEP]"]] if passage.title else []
        expected = directly(context, "context", title + pieces(passage.text))  # with every segment id 0
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    assert encoder.encode_passages(PASSAGES, batch_size=batch_size).tobytes() == vectors.tobytes()
    assert encoder.encode_passages([]).shape == (0, encoder.dimension) == (0, 24)


@needs_local
def test_a_plain_text_is_a_passage_without_a_title(question: Path, context: Path) -> None:
    encoder = DPRContextEncoder(context, question=question)
    plain, untitled, titled = encoder.encode_passages(
        ["paris is long", Document(0, "", "paris is long"), Document(0, "paris", "is long")], batch_size=1
    )
    np.testing.assert_array_equal(plain, untitled)
    assert np.abs(plain - titled).max() > 0.01


@needs_local
def test_a_question_s_vector_does_not_depend_on_its_batch(question: Path) -> None:
    encoder = DPRQuestionEncoder(question)
    alone = [encoder.encode([text]).tobytes() for text in QUESTIONS]
    assert [vector.tobytes() for vector in encoder.encode(QUESTIONS)] == alone
    assert [vector.tobytes() for vector in encoder.encode(QUESTIONS[::-1])] == alone[::-1]


@needs_local
def test_what_is_too_long_is_cut_where_dpr_cuts_it(question: Path, context: Path) -> None:
    (long,) = DPRQuestionEncoder(question).encode(["paris " * 254 + "river " * 50])
    np.testing.assert_array_equal(long, directly(question, "question", [ID["paris"]] * 254))

    encoder = DPRContextEncoder(context, question=question)
    (vector,) = encoder.encode_passages([Document(0, "a long river", "paris " * 300)])
    kept = [*pieces("a long river"), ID["[SEP]"], *[ID["paris"]] * 250]  # the title is shorter and stays
    np.testing.assert_allclose(vector, directly(context, "context", kept), atol=1e-5)


@needs_local
def test_a_model_for_fewer_tokens_sets_the_length(tmp_path: Path) -> None:
    folder = make(tmp_path / "short", "question", seed=4, max_position_embeddings=16)
    (vector,) = DPRQuestionEncoder(folder).encode(["paris " * 40])
    np.testing.assert_array_equal(vector, directly(folder, "question", [ID["paris"]] * 14))


@needs_local
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize("lower", [True, False])
def test_capitals_are_treated_as_the_files_say(tmp_path: Path, lower: bool, file: str) -> None:
    folder = make(tmp_path / "question", "question", seed=5, lower=lower)
    if file == "vocab.txt":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (vector,) = DPRQuestionEncoder(folder).encode(["Paris"])
    np.testing.assert_array_equal(vector, directly(folder, "question", [ID["paris" if lower else "Paris"]]))


# Names and fingerprints ---------------------------------------------------------------------------------------------


@needs_local
def test_both_sides_are_opened_by_one_name(question: Path, context: Path) -> None:
    name = f"dpr:{question},{context}"
    queries, passages = open_encoder(name), open_passage_encoder(name)
    assert queries.name == passages.name == DPRContextEncoder(context, question=question).name == name
    assert queries.dimension == passages.dimension == 24
    assert queries.fingerprint() == passages.fingerprint() != passages.passage_fingerprint()
    assert passages.passage_fingerprint() == DPRContextEncoder(context, question=context).fingerprint()

    alone = open_encoder(f"dpr:{question}")  # all that serving needs
    assert alone.name == DPRQuestionEncoder(question).name == f"dpr:{question}"
    assert alone.fingerprint() == queries.fingerprint()
    assert alone.encode(QUESTIONS).tobytes() == queries.encode(QUESTIONS).tobytes()
    with pytest.raises(BadKnowledge, match="takes both sides; give 'dpr:QUESTION,CONTEXT'"):
        open_passage_encoder(f"dpr:{question}")


def test_a_name_has_one_or_two_sides() -> None:
    assert sides("dpr:a/b,c/d") == ("a/b", "c/d")
    assert sides("dpr:a/b") == ("a/b", "")
    for wrong in ("dpr:", "dpr:,c", "dpr:a,b,c"):
        with pytest.raises(BadKnowledge, match="is not of the form 'dpr:QUESTION,CONTEXT'"):
            sides(wrong)


@needs_local
@pytest.mark.skipif(not FAISS, reason="needs the extra 'local'")
def test_serves_an_index_of_its_passages(question: Path, context: Path) -> None:
    from ralmspec.retrievers.dense import ExactDense

    vectors = open_passage_encoder(f"dpr:{question},{context}").encode_passages(PASSAGES)
    encoder = open_encoder(f"dpr:{question}")
    index = ExactDense(PASSAGES, vectors, encoder)
    rankings = index.search(index.encode([Query(text=text) for text in QUESTIONS]), 2)
    products = encoder.encode(QUESTIONS) @ vectors.T  # inner products: DPR does not normalise
    assert [ranking.ids[0] for ranking in rankings] == products.argmax(axis=1).tolist()
    assert (np.abs(np.linalg.norm(vectors, axis=1) - 1) > 0.01).all()


# What cannot be served ----------------------------------------------------------------------------------------------


@needs_local
def test_files_as_they_were_published_load_in_silence(question: Path, tmp_path: Path) -> None:
    """They hold a pooler that DPR does not use, positions as a tensor, and older names of the layer norms."""
    import transformers
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "published"
    shutil.copytree(question, folder)
    tensors = load_file(folder / "model.safetensors")
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert older.keys() != tensors.keys()
    older["question_encoder.bert_model.pooler.dense.weight"] = np.ones((24, 24), np.float32)
    older["question_encoder.bert_model.embeddings.position_ids"] = np.arange(512)[np.newaxis]
    save_file(older, folder / "model.safetensors", {"format": "pt"})
    told: list[logging.LogRecord] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record)

    listener = Listener()
    logger = logging.getLogger("transformers")  # hands on what it logs only where the variable CI is set
    logger.addHandler(listener)
    try:
        transformers.DPRQuestionEncoder.from_pretrained(folder)
        assert len(told) == 1
        encoder = DPRQuestionEncoder(folder)
        assert len(told) == 1
    finally:
        logger.removeHandler(listener)
    assert encoder.encode(QUESTIONS).tobytes() == DPRQuestionEncoder(question).encode(QUESTIONS).tobytes()
    assert encoder.fingerprint() != DPRQuestionEncoder(question).fingerprint()


@needs_local
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("other side", "the weights lack 37 of its tensors, 'question_encoder.+ or are those of DPR's other side"),
        ("one tensor less", "the weights lack 1 of its tensors, 'question_encoder.+word_embeddings"),
        ("another width", "cannot be loaded"),
        ("pickled weights", r"model\.bin is pickled, which can run code"),
        ("no weights", "cannot be loaded"),
        ("broken weights", "cannot be loaded"),
        ("no config", "cannot be loaded"),
        ("another model", "holds a 'bert' model; a DPR encoder's is 'dpr'"),
        ("no tokenizer", "holds neither tokenizer.json nor a vocabulary"),
        ("foreign tokenizer", "the tokenizer has 28 tokens, the model knows 27"),
        ("another kind of tokenizer", r"the tokenizer cannot be loaded.+neither tokenizer\.json nor vocab\.txt"),
    ],
)
def test_a_damaged_model_is_named(question: Path, context: Path, tmp_path: Path, damage: str, complaint: str) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(context if damage == "other side" else question, folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    match damage:
        case "one tensor less":
            tensors = load_file(weights)
            del tensors["question_encoder.bert_model.embeddings.word_embeddings.weight"]
            save_file(tensors, weights, {"format": "pt"})
        case "another width":
            (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
        case "pickled weights":
            weights.rename(folder / "pytorch_model.bin")
        case "no weights":
            weights.unlink()
        case "broken weights":
            weights.write_bytes(b"\0" * 100)
        case "no config":
            (folder / "config.json").unlink()
        case "another model":
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "foreign tokenizer":
            (folder / "tokenizer.json").unlink()
            (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, "more"]) + "\n")
        case "another kind of tokenizer":
            (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(BadKnowledge, match=f"DPR question encoder {folder}: .*{complaint}"):
        open_encoder(f"dpr:{folder},{context}")


@needs_local
def test_a_folder_or_device_that_is_not_there_is_named(question: Path, context: Path, tmp_path: Path) -> None:
    with pytest.raises(BadKnowledge, match="DPR question encoder .*nowhere: there is no such folder"):
        open_encoder(f"dpr:{tmp_path / 'nowhere'}")
    with pytest.raises(BadKnowledge, match="DPR context encoder .*nowhere: there is no such folder"):
        open_passage_encoder(f"dpr:{question},{tmp_path / 'nowhere'}")
    with pytest.raises(BadKnowledge, match="DPR question encoder .*nowhere: there is no such folder"):
        open_passage_encoder(f"dpr:{tmp_path / 'nowhere'},{context}")
    with pytest.raises(ValueError, match="device 'cuda:99' is not there"):
        open_encoder(f"dpr:{question}", device="cuda:99")


@needs_local
def test_a_vector_that_is_not_finite_is_not_stored(question: Path, context: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(context, tmp_path / "context")
    tensors = load_file(tmp_path / "context" / "model.safetensors")
    tensors["ctx_encoder.bert_model.embeddings.word_embeddings.weight"][ID["city"]] = np.inf
    save_file(tensors, tmp_path / "context" / "model.safetensors", {"format": "pt"})
    encoder = DPRContextEncoder(tmp_path / "context", question=question)
    with pytest.raises(BadKnowledge, match="passage 1 of the call has a vector that is not finite"):
        encoder.encode_passages(PASSAGES)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_without_its_packages_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[local\]'"):
        open_encoder("dpr:someone/question")
