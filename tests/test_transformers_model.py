# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""The local model continues prefixes exactly, whatever its KV slots hold and whatever fails."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_models import CONTEXT, SPECIAL, VOCABULARY, tiny_model

from ralmspec.stages import checkpoint as checkpoints
from ralmspec.stages.errors import ModelFailed
from ralmspec.stages.model import Prefix
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
    model.forward([Prefix(session=1, tokens=tokens)])
    tokens[50:] = B[:82]
    np.testing.assert_allclose(logits(model, tokens), logits(load("llama", "float64"), tokens), rtol=0, atol=1e-9)


def test_a_read_only_array_is_as_good(load):
    tokens = A.copy()
    tokens.setflags(write=False)
    (frontier,) = load().forward([Prefix(session=1, tokens=tokens)])
    assert frontier.logits.shape == (VOCABULARY,)


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
