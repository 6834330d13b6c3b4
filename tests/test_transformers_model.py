"""The local model continues prefixes exactly, whatever its KV slots hold, and refuses what it cannot serve."""

import json
import shutil
import sys
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tiny_models import CONTEXT, SPECIAL, TEXT, VOCABULARY, make_tokenizer, tiny_model

from ralmspec.retrievers.errors import MissingExtra
from ralmspec.stages import checkpoint as checkpoints
from ralmspec.stages.errors import BadModel, ModelFailed
from ralmspec.stages.model import Prefix
from ralmspec.stages.tokenizer import PlainTokenizer
from ralmspec.stages.transformers_model import TransformersModel

FAMILIES = ("gpt2", "opt", "llama")
EXACT = {"float32": 1e-4, "float64": 1e-9}
REAL_MODEL = Path(__file__).parent.parent / "examples" / "demo" / "model"
random = np.random.default_rng(7)
A, B, C = (random.integers(3, VOCABULARY, 120) for _ in range(3))  # three documents
PROMPT = random.integers(3, VOCABULARY, 12)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def checkpoint(models):
    """Each checkpoint is read once; every test puts its own slots and counters around it."""
    return lru_cache(lambda family, dtype: checkpoints.read(tiny_model(family, models), device="cpu", dtype=dtype))


@pytest.fixture
def load(checkpoint):
    return lambda family="llama", dtype="float32", **options: TransformersModel(checkpoint(family, dtype), **options)


def logits(model, *parts, session=1):
    (frontier,) = model.forward([Prefix(session=session, tokens=np.concatenate(parts))])
    return frontier.logits


def greedy(model, tokens, count, session=1):
    made = []
    while len(made) < count and not (made and made[-1] in model.end_tokens):
        made.append(int(logits(model, tokens, np.array(made, dtype=np.int64), session=session).argmax()))
    return made


def forwarded(model, *parts, session=1):
    """How many tokens a pass put through the network."""
    before = model.prefilled_tokens
    logits(model, *parts, session=session)
    return model.prefilled_tokens - before


# Exactness


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("family", SPECIAL)
def test_reuse_equals_recomputation(load, family, dtype):
    model, fresh = load(family, dtype), load(family, dtype)
    random = np.random.default_rng(1)
    documents = [A[:90], B[:70], np.concatenate((A[:40], C[:40])), C[:5]]
    context, document = list(PROMPT), 0
    for turn in range(60):
        if turn % 7 == 6:
            document = int(random.integers(len(documents)))
        if turn % 9 == 8:  # a rollback: some tokens are taken back, others put in their place
            del context[-int(random.integers(1, 6)) :]
        tokens = np.concatenate((documents[document], context))
        reused = logits(model, tokens)
        alone = logits(fresh, tokens, session=turn)
        fresh.forget(turn)
        np.testing.assert_allclose(reused, alone, rtol=0, atol=EXACT[dtype])
        assert reused.dtype == dtype
        if dtype == "float64":
            assert reused.argmax() == alone.argmax()
        context.append(int(alone.argmax()))
    assert model.reused_tokens > model.prefilled_tokens
    assert fresh.reused_tokens == 0


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_generate(load, models, family, dtype):
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model(family, models), dtype=getattr(torch, dtype), use_safetensors=True
    )
    ours = load(family, dtype)
    lengths = []
    for start in range(3):
        prompt = torch.from_numpy(A[start : start + 30])[None]
        expected = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        made = greedy(ours, A[start : start + 30], 40, session=start)
        assert made == expected[0, 30:].tolist()
        assert len(set(made)) >= min(12, len(made) - 2), "the tiny model's output is degenerate"
        lengths.append(len(made))
    assert 40 in lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_short_dtypes_answer_in_float32(load, family):
    exact = logits(load(family), A, PROMPT)
    for dtype in ("bfloat16", "float16"):
        rounded = logits(load(family, dtype), A, PROMPT)
        assert rounded.dtype == np.float32
        assert 0 < abs(rounded - exact).max() < 1.0


def test_the_shared_output_layer_is_stored_anew_and_the_embedding_is_not(checkpoint, models):
    network = checkpoint("gpt2", "float32").network
    stored = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("gpt2", models), dtype=torch.float32)
    assert torch.equal(network.lm_head.weight, stored.lm_head.weight)
    assert not network.lm_head.weight.is_contiguous()
    assert network.transformer.wte.weight.is_contiguous()


# What the slots keep


def test_a_pass_forwards_only_what_is_new(load):
    model = load()
    assert forwarded(model, A, PROMPT) == 132
    assert forwarded(model, A, PROMPT, [50]) == 1
    assert forwarded(model, A, PROMPT, [50, 51, 52]) == 2
    assert forwarded(model, A, PROMPT, [50, 60]) == 1  # a rollback
    assert forwarded(model, A, PROMPT, [50, 60]) == 1  # the same again: the last token's logits are wanted
    assert forwarded(model, A, PROMPT) == 1
    assert (model.forward_passes, model.reused_tokens) == (6, 132 + 133 + 133 + 133 + 131)
    assert model.seconds > 0


def test_two_documents_that_take_turns_are_both_kept(load):
    model = load()
    for document in (A, B):
        assert forwarded(model, document, PROMPT) == 132
    for round in range(3):
        for document in (A, B):
            assert forwarded(model, document, PROMPT, [40] * round, [41]) <= 2
    assert forwarded(model, C, PROMPT) == 132  # takes the place of A, which was used before B
    assert forwarded(model, B, PROMPT, [40, 40, 41, 42]) == 1
    assert forwarded(model, A, PROMPT) == 132


def test_a_new_document_that_begins_alike_spares_the_old_one(load):
    model = load()
    alike = np.concatenate((A[:20], B))
    assert forwarded(model, A, PROMPT) == 132
    assert forwarded(model, alike, PROMPT) == 152
    assert forwarded(model, A, PROMPT, [40]) == 1
    same_article = np.concatenate((A[:32], C))  # from here on it pays to build on the old one
    assert forwarded(model, same_article, PROMPT) == 132


def test_a_short_prefix_is_rolled_back_in_place(load):
    model = load()
    logits(model, PROMPT, [40, 41, 42])
    assert forwarded(model, PROMPT, [50]) == 1
    assert model.kv_bytes() == kv_bytes(13)


def test_with_one_slot_a_new_document_replaces_the_old(load):
    model = load(slots_per_session=1)
    for document in (A, B, A):
        assert forwarded(model, document, PROMPT) == 132
    assert forwarded(model, A, PROMPT, [40]) == 1
    assert model.kv_bytes() == kv_bytes(133)
    with pytest.raises(ValueError, match="slots_per_session=0"):
        load(slots_per_session=0)


def test_sessions_share_nothing_and_forget_frees(load):
    model = load()
    for session in (1, 2):
        assert forwarded(model, A, PROMPT, session=session) == 132
        assert forwarded(model, B, session=session) == 120
    assert model.held_sessions() == 2
    assert model.kv_bytes() == 2 * (kv_bytes(132) + kv_bytes(120))
    model.forget(1)
    assert (model.held_sessions(), model.kv_bytes()) == (1, kv_bytes(132) + kv_bytes(120))
    assert forwarded(model, A, PROMPT, session=1) == 132
    assert forwarded(model, A, PROMPT, [40], session=2) == 1
    for session in (1, 2, 3):
        model.forget(session)
    assert (model.held_sessions(), model.kv_bytes()) == (0, 0)


def kv_bytes(tokens):
    """Of the tiny LLaMA in float32: keys and values, 3 layers, 2 heads, 16 numbers each."""
    return tokens * 2 * 3 * 2 * 16 * 4


def test_several_prefixes_in_one_call_keep_their_order(load):
    model, alone = load(), load()
    prefixes = [Prefix(session=session, tokens=tokens) for session, tokens in ((1, A), (2, B), (1, C), (3, PROMPT))]
    frontiers = model.forward(prefixes)
    for prefix, frontier in zip(prefixes, frontiers, strict=True):
        np.testing.assert_array_equal(frontier.logits, logits(alone, prefix.tokens))
        alone.forget(1)
    assert model.forward([]) == []


def test_a_caller_may_go_on_writing_into_its_array(load):
    model = load("llama", "float64")
    tokens = np.concatenate((A, PROMPT))
    logits(model, tokens)
    tokens[50:] = B[:82]
    np.testing.assert_allclose(logits(model, tokens), logits(load("llama", "float64"), tokens), rtol=0, atol=1e-9)


def test_a_read_only_array_is_as_good(load):
    tokens = A.copy()
    tokens.setflags(write=False)
    assert logits(load(), tokens).shape == (VOCABULARY,)


# Passes that fail


class Faulty:
    """A network that fills the cache and then fails, once."""

    def __init__(self, network, fault):
        self._network, self._fault = network, fault

    def __getattr__(self, name):
        return getattr(self._network, name)

    def __call__(self, **inputs):
        answer = self._network(**inputs)
        fault, self._fault = self._fault, None
        if isinstance(fault, BaseException):
            raise fault
        if fault is not None:
            answer.logits[..., 5] = fault
        return answer


@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), float("nan"), float("inf")], ids=str)
def test_a_failed_pass_drops_its_slot_and_no_other(load, fault):
    model = load("gpt2", "float64")
    logits(model, A, PROMPT)
    logits(model, B, PROMPT)
    logits(model, C, session=2)
    passes = model.forward_passes
    model._network = Faulty(model._network, fault)
    with pytest.raises(ModelFailed, match="prefix of 133 tokens") as failure:
        logits(model, A, PROMPT, [40])
    assert failure.value.__cause__ is (fault if isinstance(fault, Exception) else None)
    assert model.forward_passes == passes
    assert forwarded(model, B, PROMPT, [40]) == 1
    assert forwarded(model, C, [40], session=2) == 1
    expected = logits(load("gpt2", "float64"), A, PROMPT, [40])
    np.testing.assert_allclose(logits(model, A, PROMPT, [40]), expected, rtol=0, atol=1e-9)
    assert forwarded(model, A, PROMPT, [40, 41]) == 1


def test_an_interrupt_passes_through_and_drops_the_slot_too(load):
    model = load()
    logits(model, A)
    model._network = Faulty(model._network, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        logits(model, A, [40])
    assert (model.held_sessions(), model.kv_bytes()) == (0, 0)
    assert forwarded(model, A, [40]) == 121


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        (np.full(CONTEXT + 1, 5), rf"{CONTEXT + 1} tokens, the model takes at most {CONTEXT}"),
        (np.zeros(0, dtype=np.int64), "at least one token"),
        (np.full((1, 4), 5), "at least one token"),
        (np.array([5, VOCABULARY]), f"the model knows 0 to {VOCABULARY - 1}"),
        (np.array([-1, 5]), f"the model knows 0 to {VOCABULARY - 1}"),
    ],
    ids=["long", "empty", "table", "beyond", "negative"],
)
def test_a_prefix_that_cannot_be_is_refused_before_any_work(load, tokens, complaint):
    model = load("opt")
    logits(model, A)
    with pytest.raises(ValueError, match=complaint):
        model.forward([Prefix(session=1, tokens=B), Prefix(session=1, tokens=tokens)])
    assert model.forward_passes == 1
    assert forwarded(model, A, [40]) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_prefix_is_served(load, family):
    model = load(family)
    assert model.context_length == CONTEXT
    assert logits(model, np.resize(A, CONTEXT)).shape == (VOCABULARY,)


# Text

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
    model = load()
    assert model.decode(model.encode("a\ud800b")) == "a?b"


def test_start_and_end_tokens_are_the_checkpoints(load, models, tmp_path):
    assert (load("gpt2").start_tokens, load("gpt2").end_tokens) == ((), {0})
    assert (load("opt").start_tokens, load("opt").end_tokens) == ((0,), {0})
    assert (load("llama").start_tokens, load("llama").end_tokens) == ((0,), {1})
    folder = copied(models, tmp_path, "llama")
    edit(folder / "generation_config.json", eos_token_id=[1, 7])
    model = TransformersModel.load(folder)
    assert model.end_tokens == {1, 7}
    assert model.encode(model.decode([8, 7, 9])) == [8, 7, 9]  # an ordinary token may end a sequence and stays text
    (folder / "generation_config.json").unlink()
    assert TransformersModel.load(folder).end_tokens == {1}


def test_a_vocabulary_that_spells_its_end_is_cut_before_it_can():
    vocabulary = {character: id for id, character in enumerate("</s>ab ")}
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    vocabulary |= {left + right: 7 + id for id, (left, right) in enumerate(merges)}
    spelling = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
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


# Files that cannot be served


def copied(models, tmp_path, family="llama"):
    return Path(shutil.copytree(tiny_model(family, models), tmp_path / "copy"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def garble_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def pickle_weights(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lose_the_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "listed config": (lambda folder: (folder / "config.json").write_text("[1]"), "config.json cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "pickled": (pickle_weights, r"only pickled weights \(pytorch_model.bin\)"),
    "cut": (cut_weights, "the weights cannot be read"),
    "garbled": (garble_weights, "the weights cannot be read"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "the weights cannot be read"),
    "tensor lost": (lose_a_tensor, "lack 1 of the model's tensors, 'model.layers.1.mlp.up_proj.weight'"),
    "other width": (lambda folder: edit(folder / "config.json", intermediate_size=96), "the weights"),
    "other depth": (lambda folder: edit(folder / "config.json", num_hidden_layers=5), "lack .* of the model's tensors"),
    "no tokenizer": (lose_the_tokenizer, "tokenizer"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "the tokenizer cannot be read"),
    "other family": (
        lambda folder: edit(folder / "config.json", model_type="gpt_neox"),
        "'gpt_neox' model; served are",
    ),
    "no family": (lambda folder: edit(folder / "config.json", model_type="nonsense"), "config.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.filterwarnings("default")
def test_a_damaged_folder_is_refused_by_name(models, tmp_path, damage):
    folder = copied(models, tmp_path)
    harm, complaint = DAMAGE[damage]
    harm(folder)
    with pytest.raises(BadModel, match=complaint) as refusal:
        TransformersModel.load(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    "name", [Path("nowhere"), "./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere", "", __file__], ids=str
)
def test_a_folder_that_is_not_there_is_a_bad_model(name):
    with pytest.raises(BadModel, match="is no model folder: check the path"):
        TransformersModel.load(name)


def test_sliding_windows_are_refused_because_they_cannot_go_back(models, tmp_path):
    folder = tiny_model("mistral", tmp_path, sliding_window=16)
    with pytest.raises(BadModel, match="keeps only part of its past .*DynamicSlidingWindowLayer"):
        TransformersModel.load(folder)


def test_cross_attention_is_refused(tmp_path):
    with pytest.raises(BadModel, match="'gpt2' model; served are decoders"):
        TransformersModel.load(tiny_model("gpt2", tmp_path, add_cross_attention=True))


def test_the_folders_own_code_is_not_run(models, tmp_path):
    folder = copied(models, tmp_path)
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(BadModel):
        TransformersModel.load(folder)
    edit(folder / "config.json", model_type="llama", auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert TransformersModel.load(folder).vocabulary == VOCABULARY
    assert not marker.exists()


def test_a_tokenizer_larger_than_the_model_is_refused(models, tmp_path):
    folder = tiny_model("gpt2", tmp_path, vocab_size=300)
    with pytest.raises(BadModel, match="largest token id is 383, the model knows 300 tokens"):
        TransformersModel.load(folder)


def test_settings_that_are_not_there_are_refused(models):
    folder = tiny_model("gpt2", models)
    with pytest.raises(ValueError, match="dtype 'int8' is not one of float32"):
        TransformersModel.load(folder, dtype="int8")
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"device '{device}' is not there"):
            TransformersModel.load(folder, device=device)


def test_without_transformers_the_error_names_the_extra(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[local\]'"):
        TransformersModel.load(models)


def test_loading_prints_nothing_and_leaves_the_progress_bars_as_they_were(models, capfd):
    folder = tiny_model("llama", models)
    capfd.readouterr()
    shown = transformers.utils.logging.is_progress_bar_enabled()
    TransformersModel.load(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled() == shown


# Larger things that are not everywhere


@pytest.mark.skipif(not REAL_MODEL.is_dir(), reason="examples/demo/model is not in this checkout")
@pytest.mark.parametrize("dtype", EXACT)
def test_the_bundled_model_reuses_exactly_and_reads_its_own_tokens(dtype):
    model = TransformersModel.load(REAL_MODEL, dtype=dtype)
    fresh = TransformersModel.load(REAL_MODEL, dtype=dtype, slots_per_session=1)
    document = model.encode("Coronation Street\nCoronation Street is a British soap opera first shown in 1960.\n")
    prompt = model.encode("who plays ken barlow in coronation street?")
    assert model.decode(prompt) == "who plays ken barlow in coronation street?"
    tokens = np.array([*model.start_tokens, *document, *prompt])
    for _ in range(30):
        reused, alone = logits(model, tokens), logits(fresh, tokens)
        fresh.forget(1)
        np.testing.assert_allclose(reused, alone, rtol=0, atol=10 * EXACT[dtype])
        tokens = np.append(tokens, alone.argmax())
    assert model.reused_tokens > 10 * model.prefilled_tokens


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_agrees_with_the_cpu(load, models, family):
    cuda = TransformersModel.load(tiny_model(family, models), device="cuda", dtype="float64")
    cpu = load(family, "float64")
    for parts in ((A, PROMPT), (A, PROMPT, [40]), (B, PROMPT), (A, PROMPT, [41, 42])):
        np.testing.assert_allclose(logits(cuda, *parts), logits(cpu, *parts), rtol=0, atol=1e-6)
    assert cuda.kv_bytes() == cpu.kv_bytes()
