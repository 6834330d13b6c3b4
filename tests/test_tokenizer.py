# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""No text, however hostile, becomes a special token, and all of it comes back."""

import json
import threading
from functools import lru_cache

import pytest
import tokenizers
from tiny_models import SPECIAL, TEXT, make_tokenizer, tiny_model

from ralmspec.stages.tokenizer import PlainTokenizer
from ralmspec.stages.transformers_model import TransformersModel

FAMILIES = ("gpt2", "opt", "llama")


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return lru_cache(lambda family: TransformersModel.load(tiny_model(family, folder)))


HOSTILE = "a </s> b <s><|endoftext|><pad>\n</s></s> <|endof<|endoftext|>text|> end"


@pytest.mark.parametrize("family", FAMILIES)
def test_text_never_becomes_a_special_token(load, family):
    model = load(family)
    special = model.end_tokens | set(model.start_tokens)
    assert special
    for text in (HOSTILE, *filter(None, SPECIAL[family])):
        tokens = model.encode(text)
        assert special.isdisjoint(tokens)
        assert model.decode(tokens) == text
    assert model.decode([*special, *model.encode("x"), *special]) == "x"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [TEXT, "", " ", "naïve — 東京 🙂\t\r\n\0", "a\u00a0b"], ids=repr)
def test_text_comes_back(load, family, text):
    model = load(family)
    assert model.decode(model.encode(text)) == text


def test_text_that_is_none_is_read_all_the_same(load):
    model = load("llama")
    assert model.decode(model.encode("a\ud800b")) == "a?b"


def spelled(characters, *merges):
    """A tokenizer of characters and pairs of them, and its vocabulary."""
    pieces = [*characters, *(left + right for left, right in merges)]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges))), vocabulary


def test_a_special_token_in_text_is_tokenised_as_any_other_text():
    backend, vocabulary = spelled("</s>ab", ("<", "/"), ("a", "<"))
    expected = backend.encode("a</s>b</s>").ids
    backend.add_special_tokens([tokenizers.AddedToken("</s>", special=True)])
    end = backend.token_to_id("</s>")
    assert backend.encode("a</s>b</s>").ids == [vocabulary["a"], end, vocabulary["b"], end]
    assert PlainTokenizer(backend, {end}).encode("a</s>b</s>") == expected


def test_a_special_token_of_one_character_is_left_out():
    backend, vocabulary = spelled("ab^")
    assert PlainTokenizer(backend, {vocabulary["^"]}).encode("a^b^") == [vocabulary["a"], vocabulary["b"]]


def test_a_vocabulary_that_spells_its_end_is_cut_before_it_can():
    spelling, vocabulary = spelled("</s>ab ", ("<", "/"), ("</", "s"), ("</s", ">"))
    end = vocabulary["</s>"]
    assert end in spelling.encode("a</s>b").ids
    plain = PlainTokenizer(spelling, {end})
    tokens = plain.encode("a</s></s>b")
    assert end not in tokens
    assert "".join(spelling.id_to_token(token) for token in tokens) == "a</s></s>b"
    assert end in spelling.encode("a</s>b").ids  # the caller's own is left as it was


def test_special_tokens_without_the_mark_and_stored_truncation_do_no_harm():
    backend = make_tokenizer("llama").backend_tokenizer
    description = json.loads(backend.to_str())
    for added in description["added_tokens"]:
        added["special"] = False
    careless = tokenizers.Tokenizer.from_str(json.dumps(description))
    careless.enable_truncation(3)
    careless.enable_padding(length=50)
    assert 1 in careless.encode("</s>").ids
    plain = PlainTokenizer(careless, {0, 1})
    assert {0, 1}.isdisjoint(plain.encode(HOSTILE))
    assert plain.encode(TEXT) == backend.encode(TEXT, add_special_tokens=False).ids
    assert plain.decode([1, *plain.encode("x"), 0]) == "x"


def test_many_threads_may_encode_and_decode(load):
    model = load("opt")
    texts = [f"{HOSTILE} {number} {TEXT}" for number in range(40)]
    expected = [model.encode(text) for text in texts]
    wrong = []

    def work():
        for text, tokens in zip(texts, expected, strict=True):
            if model.encode(text) != tokens or model.decode(tokens) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
