# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Several sessions in one forward pass: who shares it, and how much of a prefix it reads, changes nothing but time."""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONTEXT, VOCABULARY, tiny_model

from ralmspec.stages import checkpoint as checkpoints
from ralmspec.stages.checkpoint import FAMILIES
from ralmspec.stages.errors import ModelFailed
from ralmspec.stages.kv_slots import BLOCK, KvLayout
from ralmspec.stages.model import Frontier, Prefix, read_to_end
from ralmspec.stages.transformers_model import TransformersModel

random = np.random.default_rng(11)
A, B, C = (random.integers(3, VOCABULARY, n) for n in (150, 90, 40))
TOKEN_BYTES = 2 * 3 * 2 * 16 * 4  # of the tiny LLaMA in float32


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    @lru_cache
    def read(family, dtype, **settings):
        return checkpoints.read(tiny_model(family, folder, **settings), device="cpu", dtype=dtype)

    return lambda family="llama", dtype="float64", **options: TransformersModel(read(family, dtype), **options)


def prefixes(*sequences, first=1):
    return [Prefix(session=first + n, tokens=np.asarray(tokens)) for n, tokens in enumerate(sequences)]


def alone(model, tokens, proposed=0):
    """Computed by itself, from the first token, by PyTorch's own attention and without any memory."""
    logits, keys = model.evaluate(np.asarray(tokens)[None])
    return Frontier(logits[0, -1], keys[0, -1], logits[0, -1 - proposed : -1] if proposed else None)


def same(frontier, expected):
    np.testing.assert_allclose(frontier.logits, expected.logits, rtol=0, atol=1e-9)
    np.testing.assert_allclose(frontier.key, expected.key, rtol=0, atol=1e-5)
    assert (frontier.proposed is None) == (expected.proposed is None)
    if expected.proposed is not None:
        np.testing.assert_allclose(frontier.proposed, expected.proposed, rtol=0, atol=1e-9, strict=True)


class Instead:
    """A network whose passes are another's."""

    def __init__(self, network, run):
        self.device = network.device
        self.run = run

    def __call__(self, **inputs):
        return self.run(**inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_sessions_that_join_go_back_and_leave_get_what_they_would_alone(load, family):
    model, other = load(family), load(family)
    rounds: list[Any] = [
        [A, B],
        [[*A, 50], [*B, 51], C],  # one joins
        [[*A, 60], [*B, 51, 52, 53], [*C, 54]],  # one goes back, one reads three tokens
        [[*C, 54, 55], [*A[:100], 40], C[:2]],  # one leaves, one goes far back, one begins anew
    ]
    names = [[1, 2], [1, 2, 3], [1, 2, 3], [3, 1, 2]]
    for sessions, sequences in zip(names, rounds, strict=True):
        batch = [Prefix(session=s, tokens=np.asarray(t)) for s, t in zip(sessions, sequences, strict=True)]
        for prefix, frontier in zip(batch, model.forward(batch), strict=True):
            same(frontier, alone(other, prefix.tokens))
    assert model.forward_passes == len(rounds)
    assert model.reused_tokens > 150 + 90 + 150 + 90 + 40


def test_queries_may_share_heads_of_keys_and_values(tmp_path):
    path = tiny_model("llama", tmp_path, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model, other = (TransformersModel.load(path, dtype="float64") for _ in range(2))
    for sequences in ([A, B], [[*A, 5], [*B, 6, 7]]):
        for prefix, frontier in zip(batch := prefixes(*sequences), model.forward(batch), strict=True):
            same(frontier, alone(other, prefix.tokens))


def test_a_long_prefix_is_read_in_parts_and_stalls_nobody(load):
    model, other = load(pass_tokens=64, max_batch=4), load()
    model.forward(prefixes(C))
    told = []
    for number in range(3):
        decoding = [*C, *range(40, 41 + number)]
        frontier, reading, late = model.forward(prefixes(decoding, A, B))
        same(frontier, alone(other, decoding))
        told.append((reading is not None, late is not None))
        assert model.prefilled_tokens == 40 + 64 * (number + 1), "no pass forwards more, and none less while some wait"
    assert told == [(False, False), (False, False), (True, False)]
    same(reading, alone(other, A))
    same(read_to_end(model, Prefix(session=3, tokens=B)), alone(other, B))
    assert model.prefilled_tokens == 40 + 3 + 150 + 90, "nothing was read twice"


def test_going_back_in_the_middle_of_reading(load):
    model, other = load(pass_tokens=64), load()
    assert model.forward(prefixes(A)) == [None]
    changed = [*A[:40], *B]
    assert model.forward(prefixes(changed)) == [None]
    same(read_to_end(model, *prefixes(changed)), alone(other, changed))
    assert model.prefilled_tokens == 64 + len(changed) - 40


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(0, 20)), min_size=1, max_size=6),
    st.integers(6, 128),
    st.integers(0, 2**32 - 1),
)
def test_whatever_shares_a_pass(load, shapes, pass_tokens, seed):
    draw = np.random.default_rng(seed)
    model, other = load(max_batch=6, pass_tokens=pass_tokens), load()
    shapes = [(n, min(proposed, n - 1)) for n, proposed in shapes]
    sequences = [(draw.integers(3, VOCABULARY, n), proposed) for n, proposed in shapes]
    open_ = dict(enumerate(sequences))
    for _ in range(200):
        if not open_:
            break
        chosen = draw.permutation([*open_])[: draw.integers(1, len(open_) + 1)].tolist()
        batch = [Prefix(session=n, tokens=open_[n][0], proposed=open_[n][1]) for n in chosen]
        before = model.prefilled_tokens
        made = model.forward(batch)
        tail = max(prefix.proposed for prefix in batch) + 1
        assert 0 < model.prefilled_tokens - before <= pass_tokens + (tail if tail > 1 else 0)
        for prefix, frontier in zip(batch, made, strict=True):
            if frontier is not None:
                same(frontier, alone(other, prefix.tokens, prefix.proposed))
                if draw.random() < 0.5:  # a part of the proposal is taken back, and something else proposed
                    stays = len(prefix.tokens) - int(draw.integers(0, prefix.proposed + 1))
                    proposed = int(draw.integers(0, 5))
                    tokens = np.append(prefix.tokens[:stays], draw.integers(3, VOCABULARY, 1 + proposed))
                    open_[prefix.session] = tokens, proposed
                else:
                    del open_[prefix.session]
    assert not open_, "every prefix is read in the end"


# Proposals


@pytest.mark.parametrize("family", FAMILIES)
def test_a_proposal_is_answered_in_every_place_at_once(load, family):
    model, other = load(family), load(family)
    steps = [  # tokens, how many of them are proposed, how many the pass forwards
        (A, 6, 150),
        ([*A, 40, 41, 42, 43], 3, 4),
        ([*A, 40, 51, 52], 2, 3),  # the second was not what the model says
        ([*A, 40, 51, 52], 2, 3),  # the same again
        ([*A, 40, 51, 52], 0, 1),
        ([*B, 60, 61], 1, 92),  # another document
        ([*A, 40, 51, 52, 53], 3, 4),
        (A[:9], 8, 9),  # all that can be proposed
    ]
    for tokens, proposed, forwarded in steps:
        before = model.prefilled_tokens
        beside = [*C, *range(20, 20 + model.forward_passes)]
        made, ordinary = model.forward(
            [Prefix(session=1, tokens=np.asarray(tokens), proposed=proposed), *prefixes(beside, first=2)]
        )
        same(made, alone(other, tokens, proposed))
        same(ordinary, alone(other, beside))
        assert model.prefilled_tokens - before == forwarded + (len(C) if before == 0 else 1)
        assert made.proposed is None or made.proposed.base is None, "it does not keep those of the whole pass"


def test_a_proposal_that_does_not_fit_is_not_torn_and_the_next_one_waits(load):
    model, other = load(max_batch=4, pass_tokens=4), load()
    for n, tokens in enumerate((A, B, C), start=1):
        read_to_end(model, Prefix(session=n, tokens=tokens))
    batch = [
        Prefix(session=1, tokens=np.array([*A, *range(20, 26)]), proposed=5),
        Prefix(session=2, tokens=np.array([*B, *range(30, 37)]), proposed=6),
        Prefix(session=3, tokens=np.array([*C, 40])),
    ]
    before = model.prefilled_tokens
    first, second, third = model.forward(batch)
    same(first, alone(other, batch[0].tokens, 5))
    same(third, alone(other, batch[2].tokens))
    assert second is None and model.prefilled_tokens - before == 6 + 1
    (second,) = model.forward(batch[1:2])
    same(second, alone(other, batch[1].tokens, 6))
    assert model.prefilled_tokens - before == 6 + 1 + 7, "nothing was read twice"


def test_what_stands_before_a_proposal_is_read_in_parts(load):
    model, other = load(max_batch=2, pass_tokens=64), load()
    prefix = Prefix(session=1, tokens=A, proposed=30)
    told = []
    for _ in range(3):
        before = model.prefilled_tokens
        told.append((*model.forward([prefix]), model.prefilled_tokens - before))
    assert [(made is None, count) for made, count in told] == [(True, 64), (True, 55), (False, 31)]
    same(told[-1][0], alone(other, A, 30))


def test_with_as_many_sessions_as_tokens_everybody_gets_on(load):
    model, other = load(max_batch=3, pass_tokens=3), load()
    open_ = {n: Prefix(session=n, tokens=np.resize(A, 9 + n), proposed=n + 3) for n in range(3)}
    for _ in range(30):
        if not open_:
            break
        batch = [*open_.values()]
        for prefix, made in zip(batch, model.forward(batch), strict=True):
            if made is not None:
                same(made, alone(other, prefix.tokens, prefix.proposed))
                del open_[prefix.session]
    assert not open_


@pytest.mark.parametrize("proposed", [-1, 3, 4])
def test_a_proposal_that_cannot_be_is_refused_before_any_work(load, proposed):
    model = load()
    with pytest.raises(ValueError, match=f"a prefix of 3 tokens proposes {proposed}"):
        model.forward([*prefixes(A), Prefix(session=2, tokens=C[:3], proposed=proposed)])
    assert (model.forward_passes, model.held_sessions()) == (0, 0)


def test_bad_numbers_in_the_place_of_a_proposed_token_are_a_fault(load):
    model, other = load(), load()
    network = model._network

    def faulty(**inputs):
        answer = network(**inputs)
        answer.logits[0, 1, 5] = float("nan")  # of the first session's three rows, the middle one
        return answer

    model._network = Instead(network, faulty)
    first, second = model.forward([Prefix(session=1, tokens=A, proposed=2), Prefix(session=2, tokens=B, proposed=1)])
    assert isinstance(first, ModelFailed) and "150 tokens" in str(first)
    same(second, alone(other, B, 1))
    assert model.held_sessions() == 1


def test_one_sessions_bad_numbers_are_its_own_fault(load):
    model, other = load(), load()
    model.forward(prefixes(A, B, C))
    network = model._network

    def faulty(**inputs):
        answer = network(**inputs)
        answer.logits[0, 1, 5] = float("nan")
        return answer

    model._network = Instead(network, faulty)
    first, second, third = model.forward(prefixes([*A, 5], [*B, 6], [*C, 7]))
    assert isinstance(second, ModelFailed) and "91 tokens" in str(second)
    same(first, alone(other, [*A, 5]))
    same(third, alone(other, [*C, 7]))
    model._network = network
    before = model.prefilled_tokens
    same(model.forward(prefixes([*A, 5, 6], [*B, 6]))[1], alone(other, [*B, 6]))
    assert model.prefilled_tokens - before == 1 + 91, "what the bad pass left is not built on"
    for session in (1, 2, 3):
        model.forget(session)
    assert model.kv_bytes() == 0


def test_a_frontier_that_is_kept_does_not_keep_those_of_the_whole_pass(load):
    for frontier in load().forward(prefixes(A, B)):
        assert frontier.logits.base is None and frontier.key.base is None


def test_a_pass_that_raises_drops_the_slots_of_all_in_it(load):
    model = load()
    model.forward(prefixes(A, B, C))
    held = model.kv_bytes()

    def broken(**inputs):
        raise MemoryError("no room")

    network = model._network
    model._network = Instead(network, broken)
    with pytest.raises(ModelFailed, match="MemoryError: no room"):
        model.forward(prefixes([*A, 5], [*B, 6]))
    model._network = network
    assert 0 < model.kv_bytes() < held and model.held_sessions() == 1
    for session in (1, 2, 3):
        model.forget(session)
    assert model.kv_bytes() == 0


# Memory


def test_memory_stays_within_its_budget_and_second_slots_go_first(load):
    room = 512 * TOKEN_BYTES
    model = load("llama", "float32", kv_bytes=room)
    assert model.kv_tokens == 512
    model.forward(prefixes(B, B[::-1].copy())[::-1])  # sessions 2 and then 1, each with a slot of 128
    model.forward(prefixes(A))  # a second slot of session 1, of 192
    assert model.kv_bytes() == (128 + 128 + 192) * TOKEN_BYTES
    model.forward([Prefix(session=3, tokens=C)])
    assert model.kv_bytes() == room
    model.forward([Prefix(session=4, tokens=C)])
    assert model.kv_bytes() == (128 + 192 + 64 + 64) * TOKEN_BYTES, "session 1's older slot was given up"
    before = model.prefilled_tokens
    model.forward(prefixes([*A, 5], [*B[::-1], 5]))
    assert model.prefilled_tokens - before == 2, "what is needed next is still there"


def test_without_room_the_longest_unused_is_read_again(load):
    model, other = load("llama", "float32", kv_bytes=512 * TOKEN_BYTES), load("llama", "float32")
    lengths = {n: 64 * n for n in range(1, 6)}
    for n, length in lengths.items():
        model.forward([Prefix(session=n, tokens=np.resize(A, length))])
        assert model.kv_bytes() <= 512 * TOKEN_BYTES
    assert model.held_sessions() == 1
    frontier = read_to_end(model, Prefix(session=2, tokens=np.resize(A, 129)))
    np.testing.assert_allclose(frontier.logits, alone(other, np.resize(A, 129)).logits, rtol=0, atol=1e-4)


def test_a_budget_that_one_prefix_exceeds_is_refused(load):
    with pytest.raises(ValueError, match=f"one prefix of {CONTEXT} tokens takes {CONTEXT * TOKEN_BYTES} bytes"):
        load("llama", "float32", kv_bytes=CONTEXT * TOKEN_BYTES - 1)
    assert load("llama", "float32").kv_tokens == (2 << 30) // TOKEN_BYTES


@pytest.mark.parametrize(("max_batch", "pass_tokens"), [(0, 64), (8, 7)])
def test_settings_that_cannot_work_are_refused(load, max_batch, pass_tokens):
    with pytest.raises(ValueError, match=f"max_batch={max_batch}, pass_tokens={pass_tokens}"):
        load(max_batch=max_batch, pass_tokens=pass_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_that_is_counted_is_the_memory_that_is_there(load, family):
    model = load(family, "float32")
    model.forward(prefixes(A, B))
    memories = [slot.memory for slots in model._slots._held.values() for slot in slots]
    assert [memory.shape[3] for memory in memories] == [3 * BLOCK, 2 * BLOCK]
    assert model.kv_bytes() == sum(memory.untyped_storage().nbytes() for memory in memories)


def test_memory_that_cannot_be_had_is_not_counted(load, monkeypatch):
    model = load()
    model.forward(prefixes(B))
    held = model.kv_bytes()
    allocate = KvLayout.allocate

    def refuses(layout, capacity):
        if capacity:
            raise MemoryError(f"no room for {capacity} tokens")
        return allocate(layout, 0)

    monkeypatch.setattr(KvLayout, "allocate", refuses)
    with pytest.raises(ModelFailed, match="MemoryError: no room for 192 tokens"):
        model.forward([Prefix(session=2, tokens=A)])
    assert model.kv_bytes() == held
