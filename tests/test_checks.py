"""A session's checks alone: credits, flights, and verdicts that came early."""

import numpy as np

from ralmspec.pipeline import Query, Ranking
from ralmspec.stages.checks import Checks
from ralmspec.stages.messages import Check, Verdict
from ralmspec.stages.request import Request

REQUEST = Request(prompt=(1,))


def check(step: int, epoch: int = 0) -> Check:
    return Check(
        session=1,
        epoch=epoch,
        step=step,
        query=Query(text=""),
        documents=1,
        guess=None,
        position=step,
        frontier=None,
        request=REQUEST,
        cache=None,
    )


def test_a_launch_spends_no_credit_that_is_out() -> None:
    checks = Checks(window=3)
    checks.queued.extend(check(step) for step in range(2))
    first = checks.launch()
    checks.queued.extend(check(step) for step in range(2, 5))
    second = checks.launch()
    assert [check.step for check in first] == [0, 1] and [check.step for check in second] == [2]
    assert checks.credits_out == 3 and [check.step for check in checks.queued] == [3, 4]


def test_the_batch_that_lands_is_the_one_that_was_launched() -> None:
    """Two batches of the same session and epoch look alike."""
    checks = Checks(window=4)
    checks.queued.append(check(0))
    first = checks.launch()
    checks.queued.append(check(0))
    second = checks.launch()
    checks.land(second)
    assert checks.flying == [first] and checks.flying[0][0] is first[0]


def test_a_check_flies_as_it_stands() -> None:
    checks = Checks(window=4)
    checks.queued.append(check(5, epoch=1))
    assert not checks.flies(5, 1), "it waits"
    checks.launch()
    assert checks.flies(5, 1) and not checks.flies(5, 2) and not checks.flies(4, 1)


def test_what_flies_is_not_dropped() -> None:
    checks = Checks(window=4)
    checks.queued.append(check(0))
    checks.launch()
    checks.queued.append(check(1))
    truth = Ranking(np.array([1]), np.ones(1, dtype=np.float32))
    checks.verdicts[1] = Verdict(session=1, epoch=0, step=1, truth=truth, right=True, wanted=truth.ids[:0])
    checks.drop()
    assert not checks.queued and not checks.verdicts and checks.credits_out == 1
