"""The figures of a comparison, worked out by hand."""

import pytest

from ralmspec.pipeline import Answer
from ralmspec.pipeline.audit import Difference
from ralmspec.pipeline.compare import BASELINE, Runs, row, rows, step_and_search
from ralmspec.pipeline.reports import Row
from ralmspec.stages.statistics import Statistics


def served(latency_s: float, **counts: float) -> Answer:
    statistics = Statistics(latency_s=latency_s, time_to_first_token_s=latency_s / 10, **counts)  # type: ignore[arg-type]
    return Answer(text="", tokens=(), steps=(), statistics=statistics)


# 10 steps of a = 0.1 s and 10 searches of b = 0.3 s; then the same with a = 0.2 s and b = 0.1 s.
SLOW_INDEX = served(4.0, steps=10, kb_calls=10, search_s=3.0)
FAST_INDEX = served(3.0, steps=10, kb_calls=10, search_s=1.0)


def compared(*answers: Answer, baseline: tuple[Answer, ...] = (SLOW_INDEX,)) -> Row:
    reference = [answer.statistics for answer in baseline]
    return row("+P", reference, answers, [None] * len(answers), "exact")


def test_a_and_b_come_from_the_sequential_run() -> None:
    a, b = step_and_search([SLOW_INDEX.statistics, FAST_INDEX.statistics])
    assert a.tolist() == pytest.approx([0.1, 0.2]) and b.tolist() == pytest.approx([0.3, 0.1])


def test_speedup_is_the_ratio_of_mean_latencies() -> None:
    made = compared(served(2.0, checked=9), served(1.0, checked=9), baseline=(SLOW_INDEX, FAST_INDEX))
    assert made.speedup == pytest.approx(7.0 / 3.0)
    assert made.speedup_low <= made.speedup <= made.speedup_high
    assert (made.speedup_low, made.speedup_high) == pytest.approx((2.0, 3.0)), "over questions, with replacement"
    assert made.latency_s == 1.5 and made.time_to_first_token_s == pytest.approx(0.15)


def test_f_ideal_is_the_share_of_decoding() -> None:
    assert compared(served(2.0, checked=9)).f_ideal == pytest.approx(10 * 0.1 / 2.0)


def test_f_miss_counts_first_retrieval_decoding_misses_and_drain() -> None:
    # T* = b + n·a + R·b + (b - a) = 0.3 + 1.0 + 2 · 0.3 + 0.2
    assert compared(served(3.0, checked=9, rollbacks=2)).f_miss == pytest.approx(2.1 / 3.0)


def test_f_miss_has_no_drain_where_a_search_is_shorter_than_a_step() -> None:
    # T* = 0.1 + 2.0 + 0
    made = compared(served(3.0, checked=9), baseline=(FAST_INDEX,))
    assert made.f_miss == pytest.approx(2.1 / 3.0)


def test_every_retrieval_of_the_sequential_run_is_a_miss() -> None:
    made = row(BASELINE, [SLOW_INDEX.statistics], [SLOW_INDEX], [None], "exact")
    assert (made.speedup, made.gamma) == (1.0, None)
    assert made.f_miss == pytest.approx(1.0), "it waits for all of its searches, and that is what T* says"


def test_counts_are_sums_and_gamma_is_over_all_guesses() -> None:
    one = served(1.0, checked=10, matched=9, rollbacks=1, kb_calls=4, kb_queries=12, wasted_tokens=3)
    two = served(1.0, checked=30, matched=15, rollbacks=2, kb_calls=5, kb_queries=40, wasted_tokens=4)
    differences = [None, Difference(3, 1e-6, explained=True)]
    made = row("+P", [SLOW_INDEX.statistics] * 2, [one, two], differences, "exact")
    assert made.gamma == pytest.approx(24 / 40)
    assert (made.rollbacks, made.kb_calls, made.kb_queries, made.wasted_tokens) == (3, 9, 52, 7)
    assert (made.identical, made.explained, made.outputs) == (1, 1, 2)


def test_an_unexplained_difference_is_neither_identical_nor_explained() -> None:
    made = row("+P", [SLOW_INDEX.statistics], [served(1.0)], [Difference(3, 1.0, explained=False)], "exact")
    assert (made.identical, made.explained, made.outputs) == (0, 0, 1)


def test_a_comparison_cut_short_counts_what_all_have_answered() -> None:
    runs = Runs({BASELINE: None, "+P": None})  # type: ignore[dict-item]
    runs.answers = {BASELINE: [SLOW_INDEX, FAST_INDEX], "+P": [served(2.0, checked=9)]}
    runs.differences = {BASELINE: [None, None], "+P": [None]}
    assert runs.complete == 1
    assert [made.outputs for made in rows(runs, "exact")] == [1, 1]
    assert rows(runs, "exact")[1].speedup == 2.0
