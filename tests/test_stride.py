"""The stride schedulers against numbers worked out by hand, and the thresholds that follow from the formulas."""

import math

import pytest

from ralmspec.pipeline import OS3, FixedStride
from ralmspec.stages.stride import (
    OS3Stride,
    PacedStride,
    Stride,
    asynchronous_objective,
    expected_advance,
    synchronous_objective,
)


def learned(*verifications: tuple[int, int], a: float = 1.0, b: float = 1.0, asynchronous: bool = False) -> OS3Stride:
    """A scheduler that has seen these verifications: matched of checked."""
    stride = OS3().start(asynchronous=asynchronous)
    for matched, checked in verifications:
        stride.observe(matched=matched, checked=checked, step_s=a, verification_s=b)
    return stride


# Objectives ------------------------------------------------------------------------------------------------------


def test_expected_advance_counts_the_certain_step() -> None:
    assert expected_advance(1, 0.6) == 1
    assert expected_advance(2, 0.6) == pytest.approx(1 + 0.6)
    assert expected_advance(4, 0.5) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_advance(7, 0.0) == 1


def test_synchronous_objective() -> None:
    assert synchronous_objective(1, 0.6, a=2.0, b=3.0) == pytest.approx(1 / 5)
    assert synchronous_objective(3, 0.5, a=2.0, b=1.0) == pytest.approx(1.75 / 7)


def test_asynchronous_objective() -> None:
    # s = 1: a match costs max(a, b), a miss a + b.
    assert asynchronous_objective(1, 0.6, a=2.0, b=3.0) == pytest.approx(1 / (0.6 * 3 + 0.4 * 5))
    assert asynchronous_objective(1, 0.5, a=4.0, b=1.0) == pytest.approx(1 / (0.5 * 4 + 0.5 * 5))
    # s = 3, γ = 1/2: all match with 1/8, at 2a + max(a, b) = 7; else 3a + b = 9.
    assert asynchronous_objective(3, 0.5, a=2.0, b=3.0) == pytest.approx(1.75 / (7 / 8 + 9 * 7 / 8))


# The ratio b/a from which stride s + 1 is at least as good as s, for γ = 0.6: from (1 − γ^s)(s·a + a + b) =
# (1 − γ^(s+1))(s·a + b) follows b/a = ((1 − γ^s)(s + 1) − (1 − γ^(s+1))·s) / (γ^s·(1 − γ)).
THRESHOLDS = {2: 0.67, 3: 2.5, 4: 6.1, 5: 12.8, 6: 25.0, 7: 45.0, 8: 80.0}


@pytest.mark.parametrize("stride", THRESHOLDS)
def test_synchronous_thresholds_of_the_paper(stride: int) -> None:
    g, s = 0.6, stride - 1
    ratio = ((1 - g**s) * (s + 1) - (1 - g ** (s + 1)) * s) / (g**s * (1 - g))
    assert ratio == pytest.approx(THRESHOLDS[stride], rel=0.03)
    always_right = [(8, 8)] * 5  # γ is cut at 0.6
    assert learned(*always_right, b=0.99 * ratio).length == stride - 1
    assert learned(*always_right, b=1.01 * ratio).length == stride


@pytest.mark.parametrize("matched", range(5))
@pytest.mark.parametrize("b", [0.0, 0.2, 0.9, 1.0])
def test_asynchronous_stride_is_1_where_verification_is_no_longer_than_a_step(matched: int, b: float) -> None:
    assert learned(*[(matched, 4)] * 5, a=1.0, b=b, asynchronous=True).length == 1


def test_asynchronous_stride_grows_with_b() -> None:
    """γ = 0.6, b/a = 6: 1/(0.6·6 + 0.4·7) = 0.156, 1.6/(0.36·7 + 0.64·8) = 0.209, 1.96/(0.216·8 + 0.784·9) = 0.223,
    2.176/(0.1296·9 + 0.8704·10) = 0.220: the best is 3."""
    worth = [asynchronous_objective(s, 0.6, 1.0, 6.0) for s in range(1, 5)]
    assert [round(w, 3) for w in worth] == [0.156, 0.209, 0.223, 0.220]
    assert learned(*[(8, 8)] * 5, a=1.0, b=6.0, asynchronous=True).length == 3
    lengths = [learned(*[(8, 8)] * 5, b=b, asynchronous=True).length for b in (1, 2, 4, 8, 16, 32, 64)]
    assert lengths == sorted(lengths) and lengths[0] == 1 and lengths[-1] >= 5


# Estimators ------------------------------------------------------------------------------------------------------


def test_gamma_is_matches_over_matches_and_misses() -> None:
    # ΣM = 2 + 1 + 0 = 3; every verification had a miss: 3 / (3 + 3).
    assert learned((2, 3), (1, 3), (0, 3)).gamma == pytest.approx(0.5)
    # ΣM = 3 + 1 = 4, one miss: 4/5, cut at 0.6.
    assert learned((3, 3), (1, 3)).gamma == pytest.approx(0.6)
    assert learned((0, 3)).gamma == 0
    assert learned((1, 3), (0, 1)).gamma == pytest.approx(1 / 3)
    stride = OS3(gamma_max=0.9).start(asynchronous=False)
    for matched in (3, 1):
        stride.observe(matched=matched, checked=3, step_s=1.0, verification_s=1.0)
    assert stride.gamma == pytest.approx(0.8)


def test_gamma_looks_at_the_last_five_verifications() -> None:
    assert learned(*[(0, 1)] * 5, (1, 3)).gamma == pytest.approx(1 / 6)
    # After five more the first six are forgotten: ΣM = 5, 5 misses.
    assert learned(*[(0, 1)] * 6, *[(1, 3)] * 5).gamma == pytest.approx(0.5)


def test_a_and_b_are_the_last_ones() -> None:
    stride = OS3().start(asynchronous=False)
    for _ in range(5):
        stride.observe(matched=8, checked=8, step_s=1.0, verification_s=0.1)
    assert stride.length == 1
    stride.observe(matched=8, checked=8, step_s=1.0, verification_s=13.0)
    assert stride.length == 5
    stride.observe(matched=8, checked=8, step_s=13.0, verification_s=13.0)
    assert stride.length == 2
    stride.observe(matched=8, checked=8, step_s=None, verification_s=13.0)  # nothing was decoded: a stays
    assert stride.length == 2


def test_stride_starts_at_1_and_changes_first_after_two_verifications() -> None:
    stride = OS3().start(asynchronous=False)
    assert stride.length == 1
    stride.observe(matched=1, checked=1, step_s=1.0, verification_s=100.0)
    assert stride.length == 1
    stride.observe(matched=1, checked=1, step_s=1.0, verification_s=100.0)
    assert stride.length == 8


def test_nothing_is_chosen_before_a_step_was_measured() -> None:
    stride = OS3().start(asynchronous=False)
    for _ in range(4):
        stride.observe(matched=1, checked=1, step_s=None, verification_s=100.0)
    assert stride.length == 1


def test_without_a_match_there_is_nothing_to_gain() -> None:
    assert learned(*[(0, 1)] * 5, b=1000.0).length == 1
    # At γ = 0 every objective falls with s, so one match is enough to dare more.
    assert learned(*[(0, 1)] * 4, (1, 1), b=1000.0).length > 1


def test_stride_stays_within_its_bound() -> None:
    stride = OS3(longest=4).start(asynchronous=False)
    for _ in range(3):
        stride.observe(matched=4, checked=4, step_s=1.0, verification_s=1e9)
    assert stride.length == 4 == OS3(longest=4).longest


def test_times_of_zero_do_no_harm() -> None:
    for asynchronous in (False, True):
        stride = learned(*[(4, 4)] * 5, a=0.0, b=0.0, asynchronous=asynchronous)
        assert 1 <= stride.length <= OS3().longest
    assert math.isfinite(synchronous_objective(3, 0.6, 0.0, 0.0))


# Fixed -----------------------------------------------------------------------------------------------------------


def test_a_fixed_stride_learns_nothing() -> None:
    fixed: Stride = FixedStride(3).start(asynchronous=True)
    for _ in range(5):
        fixed.observe(matched=0, checked=3, step_s=1.0, verification_s=1000.0)
    assert fixed.length == 3 == FixedStride(3).longest == FixedStride().length


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FixedStride(0)
    for wrong in ({"window": 0}, {"longest": 0}, {"gamma_max": 0.0}, {"gamma_max": 1.0}):
        with pytest.raises(ValueError, match="gamma_max"):
            OS3(**wrong)


# Paced -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flights", "length"), [(1, 7), (2, 4), (3, 3), (7, 1), (20, 1)])
def test_flights_are_spread_over_the_time_that_one_takes(flights: int, length: int) -> None:
    """b/a = 6.2: in that time so many steps ask, and so many flights set out, each with an equal share of them."""
    stride: Stride = PacedStride(flights, 64)
    assert stride.length == 1, "nothing is known yet"
    stride.observe(matched=1, checked=1, step_s=0.5, verification_s=3.1)
    assert stride.length == length
    stride.observe(matched=1, checked=1, step_s=None, verification_s=300.0)
    assert stride.length == length, "nothing was decoded, so a is not known"


def test_a_paced_stride_stays_within_the_window() -> None:
    stride = PacedStride(2, 12)
    for b, length in ((1e9, 12), (0.0, 1), (12.0, 6)):
        stride.observe(matched=0, checked=1, step_s=1.0, verification_s=b)
        assert stride.length == length
