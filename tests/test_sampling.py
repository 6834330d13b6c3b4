# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Tokens are drawn as promised: right distribution, keyed by seed and position, with ties and gaps that can be told."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ralmspec.stages.errors import ModelFailed
from ralmspec.stages.sampling import Sampling

logits_of = arrays.arrays(
    st.sampled_from([np.float32, np.float64]),
    st.integers(1, 40),
    elements=st.one_of(st.integers(-4, 4), st.integers(-1280, 1280).map(lambda n: n / 64)),
)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([0.07, 0.437, 0.87, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kept(sampling, logits):
    """The tokens that top-k and top-p leave, by sorting everything; equals in order of their ids."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: sampling.top_k or None]
    shares = softmax(logits.astype(np.float64)[order] / sampling.temperature)
    together, left = 0.0, []
    for token, share in zip(order, shares, strict=True):
        if together < sampling.top_p:
            left.append(token)
        together += share
    return sorted(left)


def chi_square(picks, probabilities):
    expected = probabilities * len(picks)
    found = np.bincount(picks, minlength=len(probabilities))
    assert not found[probabilities == 0].any()
    possible = probabilities > 0
    return (((found - expected) ** 2)[possible] / expected[possible]).sum()


def test_greedy_takes_the_highest_and_the_lowest_id_among_equals():
    logits = np.array([1.0, 3.0, -2.0, 3.0, 3.0], dtype=np.float32)
    assert Sampling().pick(logits, 0) == 1
    assert Sampling(top_k=2, top_p=0.1, seed=9).pick(logits, 7) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature):
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -np.inf])
    sampling = Sampling(temperature=temperature, seed=3)
    picks = [sampling.pick(logits, position) for position in range(8000)]
    assert chi_square(picks, softmax(logits / temperature)) < 18.5  # 4 degrees of freedom, one in a thousand


def test_seeds_draw_as_freely_as_positions():
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5])
    picks = [Sampling(temperature=1.0, seed=seed).pick(logits, 0) for seed in range(8000)]
    assert chi_square(picks, softmax(logits)) < 18.5


def test_neighbouring_positions_are_independent():
    logits = np.zeros(3)
    sampling = Sampling(temperature=1.0, seed=1)
    picks = np.array([sampling.pick(logits, position) for position in range(9000)])
    assert chi_square(picks[:-1] * 3 + picks[1:], np.full(9, 1 / 9)) < 26.1  # 8 degrees of freedom


def test_filters_keep_the_distribution_of_what_they_leave():
    logits = np.log(np.array([0.05, 0.3, 0.1, 0.35, 0.2]))
    nucleus = Sampling(temperature=1.0, top_p=0.6, seed=5)
    picks = [nucleus.pick(logits, position) for position in range(5000)]
    assert chi_square(picks, np.array([0, 0.3, 0, 0.35, 0]) / 0.65) < 10.9
    both = Sampling(temperature=1.0, top_k=3, top_p=0.99, seed=5)
    picks = [both.pick(logits, position) for position in range(5000)]
    assert chi_square(picks, np.array([0, 0.3, 0, 0.35, 0.2]) / 0.85) < 13.9


def test_a_redone_token_draws_the_same_numbers():
    logits = np.random.default_rng(0).normal(size=500)
    sampling = Sampling(temperature=1.0, seed=11)
    first = [sampling.pick(logits, position) for position in range(50)]
    again = [Sampling(temperature=1.0, seed=11).pick(logits.copy(), position) for position in reversed(range(50))]
    assert again[::-1] == first
    assert len(set(first)) > 30
    other_seed = [Sampling(temperature=1.0, seed=12).pick(logits, position) for position in range(50)]
    assert sum(a == b for a, b in zip(first, other_seed, strict=True)) < 5


def test_the_stream_of_numbers_never_changes():
    # Seeded outputs are part of what users rely on: these may only change with a note in the changelog.
    sampling = Sampling(temperature=1.0, seed=2026)
    assert [sampling.pick(np.zeros(1000), position) for position in (0, 1, 2, 3, 10**6)] == [179, 131, 765, 363, 247]


def test_a_token_that_is_ruled_out_stays_out_and_leaves_the_others_their_numbers():
    logits = np.random.default_rng(1).normal(size=30)
    sampling = Sampling(temperature=2.0, seed=4)
    for position in range(40):
        winner = sampling.pick(logits, position)
        without = logits.copy()
        without[winner] = -np.inf
        assert sampling.pick(without, position) != winner
        loser = (winner + 1) % 30
        without = logits.copy()
        without[loser] = -np.inf
        assert sampling.pick(without, position) == winner


def test_equals_at_the_border_of_a_filter_stay_by_id():
    logits = np.array([1.0, 2.0, 2.0, 2.0, 0.0])
    sampling = Sampling(temperature=1.0, top_k=2)
    assert {sampling.pick(logits, position) for position in range(200)} == {1, 2}
    level = np.random.default_rng(0).choice([1.0, 1.25, 1.5], 999)
    order = np.concatenate([np.flatnonzero(level == height) for height in (1.5, 1.25)])
    assert len(order) > 600
    nucleus = Sampling(temperature=1.0, top_p=0.5)
    picks = {nucleus.pick(level, position) for position in range(4000)}
    border = max(np.flatnonzero(order == token)[0] for token in picks)
    assert 400 < border < 500
    assert len(picks) == border + 1


@given(logits_of, samplings, st.integers(0, 2**40))
@settings(max_examples=300, deadline=None)
def test_the_winner_is_among_what_the_filters_leave(logits, sampling, position):
    token = sampling.pick(logits, position)
    assert 0 <= token < len(logits)
    if sampling.temperature:
        left = kept(sampling, logits)
        lone = np.full(len(logits), -np.inf)
        lone[left] = logits[left]
        free = Sampling(temperature=sampling.temperature, seed=sampling.seed)
        assert token == free.pick(lone, position)


@given(logits_of, samplings, st.integers(0, 1000), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_logits_that_move_by_less_than_half_the_gap_give_the_same_token(logits, sampling, position, noise):
    logits = logits.astype(np.float64)
    gap = sampling.gap(logits, position)
    assert gap >= 0
    reach = min(gap, 50.0) * 0.499
    for moves in np.random.default_rng(noise).choice([-reach, 0.0, reach], (20, len(logits))):
        assert sampling.pick(logits + moves, position) == sampling.pick(logits, position)


def test_the_gap_is_what_it_takes():
    logits = np.array([0.5, 1.0, 1.75, -3.0], dtype=np.float32)
    assert Sampling().gap(logits, 0) == 0.75
    sampling = Sampling(temperature=0.7, seed=6)
    for position in range(50):
        gap, winner = sampling.gap(logits, position), sampling.pick(logits, position)
        less, more = logits.astype(np.float64), logits.astype(np.float64)
        less[winner] -= gap * 0.999
        more[winner] -= gap * 1.001
        assert sampling.pick(less, position) == winner != sampling.pick(more, position)


@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": 3}, {"top_p": 0.6}], ids=str)
def test_the_gap_is_no_smaller_than_it_must_be(filters):
    random = np.random.default_rng(5)
    slack = 4 if "top_p" in filters else 1  # a nucleus moves with every token in it: there the gap is a bound
    for position in range(60):
        logits = random.normal(size=4)
        sampling = Sampling(temperature=0.9, seed=1, **filters)
        winner, reach = sampling.pick(logits, position), sampling.gap(logits, position) * 0.5001 * slack
        moves = [np.array(signs) * reach for signs in product((-1, 0, 1), repeat=4)]
        assert any(sampling.pick(logits + move, position) != winner for move in moves)


def test_the_gap_sees_a_token_just_outside_the_filters():
    # Tokens 1 and 2 nearly tie for the last place; whichever is let in wins where its noise is the highest.
    logits = np.array([1.0, 0.5, 0.5 - 1e-7, -4.0])
    turned = np.array([1.0, 0.5, 0.5 + 1e-7, -4.0])
    flips = 0
    for sampling in (Sampling(temperature=1.0, top_k=2, seed=8), Sampling(temperature=1.0, top_p=0.7, seed=8)):
        for position in range(60):
            if sampling.pick(logits, position) != sampling.pick(turned, position):
                flips += 1
                assert sampling.gap(logits, position) < 1e-6
    assert flips > 20


def test_the_gap_is_infinite_where_only_one_token_is_possible():
    only = np.array([-np.inf, 0.0, -np.inf])
    assert Sampling().gap(only, 0) == math.inf
    assert Sampling(temperature=1.0).gap(only, 0) == math.inf
    assert Sampling(temperature=1.0, top_p=0.5).gap(np.zeros(1), 0) == math.inf


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e300])
def test_extreme_temperatures_still_choose(temperature):
    logits = np.array([-np.inf, -5.0, 7.0, 7.0, 1.0])
    sampling = Sampling(temperature=temperature, top_p=0.999)
    picks = {sampling.pick(logits, position) for position in range(100)}
    assert picks == ({2, 3} if temperature < 1 else {1, 2, 3, 4})
    assert sampling.gap(logits, 0) >= 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logits", [[0.0, np.nan, 1.0], [np.nan, np.inf], [0.0, np.inf], [-np.inf, -np.inf], []], ids=str
)
def test_logits_without_a_choice_fail(logits, temperature):
    sampling = Sampling(temperature=temperature, top_k=1)
    for choose in (sampling.pick, sampling.gap):
        with pytest.raises(ModelFailed, match="no token can be chosen"):
            choose(np.array(logits, dtype=np.float32), 0)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0.0}]
    + [{"top_p": 1.01}, {"top_p": math.nan}, {"seed": -1}, {"seed": 2**64}],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"Sampling\({next(iter(wrong))}="):
        Sampling(**wrong)
