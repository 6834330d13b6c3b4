# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""The local model continues prefixes exactly, whatever its KV slots hold and whatever fails."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_models import CONTEXT, SPECIAL, VOCABULARY, tiny_model

from ralmspec.stages import checkpoint as checkpoints
from ralmspec.stages.errors import BadModel, ModelFailed
from ralmspec.stages.model import Prefix, read_to_end
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
    return read_to_end(model, Prefix(session=session, tokens=np.concatenate(parts))).logits


def greedy(model, tokens, count, session=1):
    made: list[int] = []
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
        expected = reference.generate(  # type: ignore[misc]
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


# What a call takes


def test_several_prefixes_in_one_call_keep_their_order(load):
    model, alone = load("llama", "float64"), load("llama", "float64")
    prefixes = [Prefix(session=session, tokens=tokens) for session, tokens in ((1, A), (2, B), (1, C), (3, PROMPT))]
    frontiers = model.forward(prefixes)
    for prefix, frontier in zip(prefixes, frontiers, strict=True):
        np.testing.assert_allclose(frontier.logits, logits(alone, prefix.tokens), rtol=0, atol=1e-9)
        alone.forget(1)
    assert model.forward([]) == []


def test_a_caller_may_go_on_writing_into_its_array(load):
    model = load("llama", "float64")
    tokens = np.concatenate((A, PROMPT))
    model.forward([Prefix(session=1, tokens=tokens)])
    tokens[50:] = B[:82]
    np.testing.assert_allclose(logits(model, tokens), logits(load("llama", "float64"), tokens), rtol=0, atol=1e-9)


def test_a_read_only_array_is_as_good(load):
    tokens = A.copy()
    tokens.setflags(write=False)
    (frontier,) = load().forward([Prefix(session=1, tokens=tokens)])
    assert frontier.logits.shape == (VOCABULARY,)


# Keys


def reference(family, path, dtype, tokens):
    """Logits, and what enters the last feed-forward layer, from the network's own modules: float64 [b, w, ...].

    The logits are also computed from that state alone, so it is what stands in that place and nothing else.
    """
    network = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    attended = []
    with torch.inference_mode():
        match family:
            case "gpt2":
                block, attention = network.transformer.h[-1], network.transformer.h[-1].attn
                before, feed, after, last = block.ln_2, block.mlp, network.transformer.ln_f, None
            case "opt":
                block = network.model.decoder.layers[-1]
                attention, last = block.self_attn, network.model.decoder.final_layer_norm
                after = last or block.final_layer_norm
                before = block.final_layer_norm if block.do_layer_norm_before else block.self_attn_layer_norm
                feed = lambda x: block.fc2(torch.relu(block.fc1(x)))  # noqa: E731
            case _:
                block, attention = network.model.layers[-1], network.model.layers[-1].self_attn
                before, feed, after = block.post_attention_layernorm, block.mlp, network.model.norm
        attention.register_forward_hook(lambda module, inputs, output: attended.append(output[0]))
        passed = network(input_ids=torch.from_numpy(tokens), output_hidden_states=True)
        residual = passed.hidden_states[-2] + attended[0]
        key = before(residual)
        residual = residual if family != "opt" or block.do_layer_norm_before else key
        torch.testing.assert_close(network.lm_head(after(residual + feed(key))), passed.logits)
    return passed.logits.double().numpy(), key.double().numpy()


@pytest.fixture(scope="session")
def late_norm(tmp_path_factory):
    """An OPT whose norms come after its layers, as that of 350 million parameters."""
    return tiny_model("opt", tmp_path_factory.mktemp("late"), do_layer_norm_before=False)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("family", [*SPECIAL, "late norm"])
def test_keys_are_what_enters_the_last_feed_forward_layer(models, late_norm, family, dtype):
    name, path = ("opt", late_norm) if family == "late norm" else (family, tiny_model(family, models))
    model = TransformersModel.load(path, dtype=dtype)
    texts = np.stack((A, B, C))
    expected_logits, expected_keys = reference(name, path, dtype, texts)
    found_logits, keys = model.evaluate(texts)
    assert model.key_dimension == 64 and keys.shape == (3, 120, 64)
    assert keys.dtype == np.float32 and found_logits.dtype == dtype
    # A key is float32 even where the model is wider, so it is at most half a step away.
    np.testing.assert_allclose(keys, expected_keys, rtol=2**-24 if dtype == "float64" else 0, atol=EXACT[dtype])
    np.testing.assert_allclose(found_logits, expected_logits, rtol=0, atol=EXACT[dtype])
    np.testing.assert_allclose(model.keys(texts), keys, rtol=2**-23, atol=EXACT[dtype])
    for row, text in enumerate(texts):
        for length in (1, 57, 120):
            frontier = read_to_end(model, Prefix(session=row, tokens=text[:length]))
            assert frontier.key is not None and frontier.key.dtype == np.float32
            np.testing.assert_allclose(frontier.key, keys[row, length - 1], rtol=2**-23, atol=EXACT[dtype])
    assert model.reused_tokens, "some of those came from passes over part of the prefix"


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_short_dtypes_are_float32(load, family):
    exact = load(family).keys(A[None])
    for dtype in ("bfloat16", "float16"):
        model = load(family, dtype)
        (frontier,) = model.forward([Prefix(session=1, tokens=A)])
        for keys in (model.keys(A[None]), model.evaluate(A[None])[1], frontier.key[None, None]):
            assert keys.dtype == np.float32
            assert 0 < abs(keys[:, -1] - exact[:, -1]).max() < 1.0


def test_a_key_holds_no_more_memory_than_its_own(load):
    (frontier,) = load().forward([Prefix(session=1, tokens=A)])
    owner = frontier.key
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    assert owner.nbytes == 64 * 4 and torch.from_numpy(frontier.key).untyped_storage().nbytes() == 64 * 4


def test_texts_touch_no_session_and_no_counter(load):
    model = load()
    logits(model, A)
    before = (model.forward_passes, model.prefilled_tokens, model.kv_bytes(), model.held_sessions())
    model.keys(np.stack((B, C)))
    model.evaluate(A[None])
    assert (model.forward_passes, model.prefilled_tokens, model.kv_bytes(), model.held_sessions()) == before
    assert forwarded(model, A, [40]) == 1


def test_passes_that_run_at_the_same_time_keep_their_own_states(load):
    """Two wrappers of one network, and three kinds of pass at once: each gets the keys that it gets alone."""
    model, other = load("gpt2", "float64"), load("gpt2", "float64")
    texts = random.integers(3, VOCABULARY, (8, 4, 30))
    alone = [model.keys(text) for text in texts]
    started = threading.Barrier(4)

    def work(job):
        started.wait(10)
        for _ in range(5):
            for text, expected in zip(texts, alone, strict=True):
                match job:
                    case 0:
                        found = [
                            frontier.key for frontier in model.forward([Prefix(session=1, tokens=t) for t in text])
                        ]
                        expected = expected[:, -1]
                    case 1:
                        found = other.evaluate(text)[1]
                    case _:
                        found = (model, other)[job - 2].keys(text)
                np.testing.assert_allclose(found, expected, rtol=2**-22, atol=1e-9)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        (np.full((2, CONTEXT + 1), 5), rf"{CONTEXT + 1} tokens, the model takes at most {CONTEXT}"),
        (np.zeros((2, 0), dtype=np.int64), "at least one token"),
        (np.zeros((0, 2), dtype=np.int64), "at least one token"),
        (np.full(4, 5), "at least one token"),
        (np.array([[5, VOCABULARY]]), f"the model knows 0 to {VOCABULARY - 1}"),
        (np.array([[-1, 5]]), f"the model knows 0 to {VOCABULARY - 1}"),
    ],
    ids=["long", "empty", "none", "row", "beyond", "negative"],
)
@pytest.mark.parametrize("call", ["keys", "evaluate"])
def test_texts_that_cannot_be_are_refused(load, call, tokens, complaint):
    with pytest.raises(ValueError, match=complaint):
        getattr(load(), call)(tokens)


@pytest.mark.parametrize("call", ["keys", "evaluate"])
def test_texts_whose_pass_fails_are_told(load, call, monkeypatch):
    model = load("llama", "float32")
    norm = model._network.model.layers[-1].post_attention_layernorm
    with monkeypatch.context() as patch:
        patch.setattr(norm, "forward", lambda states: states * float("nan"))
        with pytest.raises(ModelFailed, match="2 texts of 120 tokens are not finite"):
            getattr(model, call)(np.stack((A, B)))
        patch.setattr(norm, "forward", lambda states: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(ModelFailed, match="2 texts of 120 tokens raised RuntimeError: out of memory"):
            getattr(model, call)(np.stack((A, B)))
    assert np.isfinite(getattr(model, call)(A[None])[0]).all(), "nothing of the failed pass is left"


def test_the_fingerprint_is_of_the_files_not_of_the_dtype(load, models, tmp_path):
    known = load("llama").fingerprint()
    assert len(known) == 64 and load("llama", "bfloat16").fingerprint() == known
    assert load("gpt2").fingerprint() != known
    copy = shutil.copytree(tiny_model("llama", models), tmp_path / "copy")
    model = TransformersModel.load(copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert model.fingerprint() != known
    gone = TransformersModel.load(shutil.copytree(tiny_model("llama", models), tmp_path / "gone"))
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(BadModel, match="gone"):
        gone.fingerprint()


def test_a_model_of_the_hub_has_the_fingerprint_of_its_files(load, models, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    revision = "0" * 40
    shutil.copytree(tiny_model("llama", models), tmp_path / "models--someone--tiny" / "snapshots" / revision)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text(revision)
    assert TransformersModel.load("someone/tiny").fingerprint() == load("llama").fingerprint()


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
    model._network = Faulty(model._network, fault)
    with pytest.raises(ModelFailed, match="133 tokens") as failure:
        logits(model, A, PROMPT, [40])
    assert failure.value.__cause__ is (fault if isinstance(fault, Exception) else None)
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
