# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""KV slots: what a pass forwards, which slot a new document takes, and what forgetting frees."""

import numpy as np
import pytest
from tiny_models import VOCABULARY, tiny_model

from ralmspec.stages import checkpoint as checkpoints
from ralmspec.stages.kv_slots import BLOCK
from ralmspec.stages.model import Prefix, read_to_end
from ralmspec.stages.transformers_model import TransformersModel

random = np.random.default_rng(7)
A, B, C = (random.integers(3, VOCABULARY, 120) for _ in range(3))  # three documents
PROMPT = random.integers(3, VOCABULARY, 12)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """New slots and counters around a checkpoint that is read once."""
    read = checkpoints.read(tiny_model("llama", tmp_path_factory.mktemp("models")), device="cpu", dtype="float32")
    return lambda **options: TransformersModel(read, **options)


def forwarded(model, *parts, session=1):
    """How many tokens a pass put through the network."""
    before = model.prefilled_tokens
    read_to_end(model, Prefix(session=session, tokens=np.concatenate(parts)))
    return model.prefilled_tokens - before


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
    model = load(slots_per_session=2)
    for document in (A, B):
        assert forwarded(model, document, PROMPT) == 132
    for round in range(3):
        for document in (A, B):
            assert forwarded(model, document, PROMPT, [40] * round, [41]) <= 2
    assert forwarded(model, C, PROMPT) == 132  # takes the place of A, which was used before B
    assert forwarded(model, B, PROMPT, [40, 40, 41, 42]) == 1
    assert forwarded(model, A, PROMPT) == 132


def test_a_session_returns_to_any_of_its_last_four_documents(load):
    model = load()
    documents = [random.integers(3, VOCABULARY, 120) for _ in range(5)]
    for document in documents:
        assert forwarded(model, document, PROMPT) == 132
    for document in documents[:0:-1]:
        assert forwarded(model, document, PROMPT, [40]) == 1
    assert model.kv_bytes() == 4 * kv_bytes(133)
    assert forwarded(model, documents[0], PROMPT) == 132


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
    forwarded(model, PROMPT, [40, 41, 42])
    assert forwarded(model, PROMPT, [50]) == 1
    assert model.kv_bytes() == kv_bytes(15)


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
    """Of the tiny LLaMA in float32: keys and values, 3 layers, 2 heads, 16 numbers each; memory comes in blocks."""
    return -(-tokens // BLOCK) * BLOCK * 2 * 3 * 2 * 16 * 4
