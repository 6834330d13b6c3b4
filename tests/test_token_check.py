"""Tokens written under a wrong guess stand if the model says them under the true documents too."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from clocks import run
from fakes import END, AlwaysMisses, FakeModel, fixed
from hand import PROMPT, Hand
from simulation import Eager

from ralmspec.pipeline import (
    Arrangement,
    Committed,
    Continuous,
    Drafted,
    InContext,
    ModelFailed,
    Pipeline,
    RolledBack,
    Synchronous,
)
from ralmspec.stages.messages import Check, Decoded, Pass
from ralmspec.stages.model import Frontier, Prefix
from ralmspec.stages.request import Status
from ralmspec.stages.step import Move

CHECKS = Synchronous(speculation_stride=3, token_check=True)


def doubtful(speculation: Arrangement = CHECKS, **request: Any) -> Hand:
    """Three steps of two tokens are written. The second one's document was not 5 but 9."""
    hand = Hand(speculation, **request)
    hand.play((1, 2), (3, 4), (5, 6), guesses=(5, 6, 7))
    hand.judge(hand.launch(), 9, 6, 7)
    return hand


def proposal(hand: Hand) -> Pass:
    assert hand.session.move is Move.DECODE and not hand.session.drafts, "what settles a doubt is certain work"
    made = hand.session.next_pass()
    assert made is not None and made.proposed is not None
    return made


def say(hand: Hand, *tokens: int) -> None:
    hand.session.decoded(proposal(hand), Decoded(tokens, None), seconds=0.0)


def two_flights() -> tuple[Hand, Sequence[Check], Sequence[Check]]:
    """Two steps of two tokens; the checks of the second and of what comes next fly, each in a batch of its own."""
    hand = Hand(Eager(window=8, flights=3, token_check=True))
    hand.play((1, 2), guesses=(5, 6, 7))
    first = hand.launch()
    hand.decode(3, 4)
    hand.look()
    return hand, first, hand.launch()


def test_the_pass_proposes_what_was_written_under_the_true_document() -> None:
    hand = doubtful()
    made = proposal(hand)
    assert made.retrieved is not None and int(made.retrieved.ids[0]) == 9
    assert (made.step, made.position, made.context) == (1, 2, (*PROMPT, 1, 2))
    assert made.proposed == (3,), "the place of the last token is the one behind those that are proposed"
    assert hand.committed() == [(1, 2)] and hand.session.epoch == 0


def test_if_all_of_it_stands_so_does_what_was_drafted_after_it() -> None:
    hand = doubtful()
    say(hand, 3, 4)
    assert hand.committed() == [(1, 2), (3, 4), (5, 6)], "the verdicts of later steps had come, and were waiting"
    assert [event.document.id for event in hand.events if isinstance(event, Committed)] == [5, 9, 6]
    statistics = hand.session.statistics
    assert (statistics.rollbacks, statistics.saved, statistics.wasted_tokens) == (0, 1, 0)
    assert (statistics.checked, statistics.matched) == (3, 2), "gamma counts documents"
    assert hand.session.epoch == 0


def test_what_differs_is_corrected_and_what_came_before_it_kept() -> None:
    hand = doubtful(drafts=True)
    say(hand, 3, 8)
    assert hand.committed() == [(1, 2), (3, 8)] and hand.session.transcript.context == [*PROMPT, 1, 2, 3, 8]
    statistics = hand.session.statistics
    assert (statistics.rollbacks, statistics.saved, statistics.wasted_tokens) == (1, 0, 3)
    assert hand.session.epoch == 1 and not hand.session.transcript.steps and hand.session.move is Move.LOOK
    (retraction,) = [event for event in hand.events if isinstance(event, RolledBack)]
    assert (retraction.step, retraction.tokens, retraction.document.id) == (1, 4, 9), "all drafts from the step on"


def test_what_comes_after_the_first_difference_is_not_believed() -> None:
    hand = doubtful()
    say(hand, 8, 4)
    assert hand.committed() == [(1, 2)] and hand.session.transcript.context == [*PROMPT, 1, 2, 8]
    hand.decode(4)
    assert hand.committed() == [(1, 2), (8, 4)]


def test_later_verdicts_wait_for_the_doubt() -> None:
    hand, first, second = two_flights()
    hand.decode(5, 6)
    hand.judge(first, 9)
    hand.judge(second, 8)
    assert len(hand.session.transcript.steps) == 2 and hand.session.epoch == 0
    say(hand, 3, 4)
    assert hand.committed() == [(1, 2), (3, 4)]
    assert proposal(hand).step == 2, "the next one is in doubt now"
    say(hand, 5, 6)
    assert hand.committed()[-1] == (5, 6) and hand.session.statistics.saved == 2


def test_a_step_in_doubt_may_be_unfinished() -> None:
    hand = Hand(Eager(window=8, token_check=True), stride=3)
    hand.play((1, 2, 3), guesses=(5,))
    hand.decode(4)
    running = hand.session.next_pass()  # under the guess
    assert running is not None
    hand.judge(hand.launch(), 9)
    hand.session.decoded(running, Decoded((5,), None), seconds=0.0)
    made = proposal(hand)
    assert made.proposed == (4, 5), "what was on its way is proposed as well"
    hand.session.decoded(made, Decoded((4, 5, 6), None), seconds=0.0)
    assert hand.committed() == [(1, 2, 3), (4, 5, 6)], "one more token has been said than was written"


def test_an_end_that_was_drafted_counts_only_if_it_stands() -> None:
    for said, ended in (((3, END), True), ((3, 4), False)):
        hand = Hand(CHECKS, model=FakeModel())
        hand.play((1, 2), guesses=(5,))
        hand.decode(3, END)
        hand.judge(hand.launch(), 9)
        say(hand, *said)
        assert hand.session.final is ended
        assert hand.committed() == [(1, 2), said]


def test_a_step_without_tokens_is_in_no_doubt() -> None:
    hand = Hand(CHECKS)
    hand.play((1, 2), (3, 4), (5, 6), guesses=(5, 6, 7))
    hand.judge(hand.launch(), 5, 6, 9)
    assert hand.session.transcript.steps[-1].settled
    hand.decode(7, 8)
    assert hand.committed()[-1] == (7, 8)


@pytest.mark.parametrize("speculation", [Continuous(token_check=False), Synchronous(speculation_stride=2)])
def test_without_the_check_other_documents_are_a_rollback(speculation: Arrangement) -> None:
    hand = Hand(speculation)
    hand.play((1, 2), (3, 4), guesses=(5, 6))
    hand.judge(hand.launch(), 9, 6)
    assert hand.session.transcript.context == [*PROMPT, 1, 2] and hand.session.epoch == 1


def test_a_fault_under_the_guess_is_none_once_the_step_is_in_doubt() -> None:
    hand = Hand(Eager(window=8, token_check=True))
    hand.play((1, 2), guesses=(5,))
    hand.decode(3)
    running = hand.session.next_pass()
    assert running is not None
    hand.judge(hand.launch(), 9)
    assert hand.session.give_up_draft(running)
    made = proposal(hand)
    assert not hand.session.give_up_draft(made), "under the true document a fault is one"
    hand.session.decoded(made, Decoded((3, 4), None), seconds=0.0)
    assert hand.committed() == [(1, 2), (3, 4)]


def test_the_stride_learns_of_a_guess_when_no_doubt_is_left() -> None:
    hand = doubtful()
    seen: list[tuple[int, int]] = []

    class Noting:
        length = 3

        def observe(self, *, matched: int, checked: int, step_s: float | None, verification_s: float) -> None:
            seen.append((matched, checked))

    hand.session.pace.stride = Noting()
    say(hand, 3, 4)
    assert seen == [(3, 3)], "tokens that stand are as good as the document"


def test_a_session_that_ends_in_doubt_has_ended() -> None:
    hand = doubtful()
    made = proposal(hand)
    hand.session.finish(Status.FAILED, ModelFailed("gone"))
    hand.session.decoded(made, Decoded((3, 4), None), seconds=0.0)
    assert hand.committed() == [(1, 2)] and hand.session.statistics.wasted_tokens == 2


def test_verdicts_of_another_path_do_not_end_a_doubt() -> None:
    hand, first, second = two_flights()
    hand.judge(first, 9)
    say(hand, 3, 8)
    hand.look()
    hand.judge(second, 6)
    assert [step.certain for step in hand.session.transcript.steps] == [False], "stale: nothing is known of step 2"


def test_drafts_of_a_step_in_doubt_are_shown() -> None:
    hand = Hand(Eager(window=8, token_check=True), drafts=True)
    hand.play((1, 2), guesses=(5,))
    hand.decode(3)
    running = hand.session.next_pass()
    assert running is not None
    hand.judge(hand.launch(), 9)
    hand.session.decoded(running, Decoded((4,), None), seconds=0.0)
    assert [event.token for event in hand.events if isinstance(event, Drafted)] == [3, 4]
    say(hand, 8, 4)
    (retraction,) = [event for event in hand.events if isinstance(event, RolledBack)]
    assert retraction.tokens == 2


# In a pipeline ---------------------------------------------------------------------------------------------------


class Answers(FakeModel):
    """A model that answers proposals in its own way."""

    def __init__(self, answer: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any] | None]) -> None:
        super().__init__(ends=False, stubborn=1.0)
        self._answer = answer
        self.asked = 0

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        return [self._changed(frontier) for frontier in super().forward(prefixes)]

    def _changed(self, frontier: Frontier | Exception | None) -> Frontier | Exception | None:
        if not isinstance(frontier, Frontier) or frontier.proposed is None:
            return frontier
        self.asked += 1
        return replace(frontier, proposed=self._answer(frontier.proposed))


async def served(model: Answers) -> Any:
    async with Pipeline(
        model=model,
        retriever=AlwaysMisses(),
        workload=InContext(),
        speculation=Continuous(),
        worker=fixed(model=0.1, index=0.7),
    ) as pipeline:
        return (await pipeline.complete("3 1 4", max_new_tokens=24)).statistics


def test_where_documents_do_not_matter_every_wrong_guess_is_saved() -> None:
    model = Answers(lambda rows: rows)
    statistics = run(lambda: served(model))
    assert statistics.matched == statistics.rollbacks == statistics.wasted_tokens == 0
    assert statistics.saved == statistics.checked == model.asked == 24 // 4 - 1


@pytest.mark.parametrize("answer", [lambda rows: None, lambda rows: rows[:-1], lambda rows: rows[:, :-1]])
def test_an_answer_of_another_shape_is_the_models_fault(answer: Any) -> None:
    with pytest.raises(ModelFailed, match="proposed tokens"):
        run(lambda: served(Answers(answer)))
