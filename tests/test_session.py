"""The session alone: no loop, no stages, a clock that stands still, and events in a list. Its sections, one by one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fakes import END, FakeModel, FakeRetriever, Scattered
from hand import PROMPT, Hand
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import sequential
from simulation import Eager

from ralmspec.pipeline import (
    Arrangement,
    Asynchronous,
    Cancelled,
    Committed,
    Continuous,
    Done,
    Drafted,
    Query,
    RetrieverFailed,
    RolledBack,
    Sequential,
    Synchronous,
)
from ralmspec.stages.messages import Check, Decoded, Pass
from ralmspec.stages.request import Status
from ralmspec.stages.step import Move

# Commits ---------------------------------------------------------------------------------------------------------


def test_a_step_commits_when_it_is_certain_and_complete() -> None:
    hand = Hand(Sequential())
    hand.begin()
    hand.decode(7)
    assert hand.committed() == []
    hand.decode(8)
    assert hand.committed() == [(7, 8)]
    (event,) = hand.events
    assert isinstance(event, Committed) and (event.step, event.document.id, event.document.title) == (
        0,
        5,
        "document 5",
    )


def test_drafts_wait_for_their_verdicts_and_commit_in_order() -> None:
    hand = Hand(Synchronous(speculation_stride=3))
    hand.play((1, 2), (3, 4), (5, 6), guesses=(5, 6, 7))
    assert hand.committed() == [(1, 2)]
    hand.judge(hand.launch(), 5, 6, 7)
    assert hand.committed() == [(1, 2), (3, 4), (5, 6)]
    assert [event.document.id for event in hand.events if isinstance(event, Committed)] == [5, 5, 6]
    hand.decode(7, 8)  # its document was checked with the batch
    assert hand.committed()[-1] == (7, 8)


def test_a_right_verdict_may_come_before_the_tokens() -> None:
    hand = Hand(Asynchronous(speculation_stride=1))
    hand.play((1, 2), guesses=(5,))
    checks = hand.launch()
    hand.decode(3)
    hand.judge(checks, 5)
    assert hand.committed() == [(1, 2)], "right, but not complete"
    hand.decode(4)
    assert hand.committed() == [(1, 2), (3, 4)]


def test_scores_of_the_search_replace_those_of_the_guess() -> None:
    hand = Hand(Synchronous(speculation_stride=1))
    hand.play((1, 2), guesses=(5,))
    hand.judge(hand.launch(), 5)
    hand.decode(3, 4)
    assert [event.document.score for event in hand.events if isinstance(event, Committed)] == [1.0, 1.0]


# Rollbacks -------------------------------------------------------------------------------------------------------


def test_a_rollback_in_the_middle_keeps_what_is_before_it() -> None:
    hand = Hand(Synchronous(speculation_stride=3), drafts=True)
    hand.play((1, 2), (3, 4), (5, 6), guesses=(5, 6, 7))
    hand.judge(hand.launch(), 5, 9, 7)  # the third step's document was 9; the fourth one's verdict is stale by then
    session = hand.session
    assert hand.committed() == [(1, 2), (3, 4)]
    assert session.transcript.context == [*PROMPT, 1, 2, 3, 4] and session.epoch == 1
    (retraction,) = [event for event in hand.events if isinstance(event, RolledBack)]
    assert (retraction.step, retraction.tokens, retraction.document.id) == (2, 2, 9)
    made = session.next_pass()
    assert made is not None
    assert made.retrieved is not None
    assert (made.step, made.position, made.epoch, int(made.retrieved.ids[0])) == (2, 4, 1, 9)
    hand.decode(8, 8)
    assert hand.committed()[-1] == (8, 8), "the redo needs no check"
    assert not session.checks.queued and session.move is Move.LOOK
    statistics = session.statistics
    assert (statistics.rollbacks, statistics.wasted_tokens, statistics.checked, statistics.matched) == (1, 2, 2, 1)


def test_a_stale_token_is_dropped() -> None:
    hand = Hand(Asynchronous(speculation_stride=1), drafts=True)
    hand.play((1, 2), guesses=(5,))
    checks = hand.launch()
    hand.decode(3)
    running = hand.session.next_pass()
    assert running is not None
    hand.judge(checks, 9)
    hand.session.decoded(running, Decoded((4,), None), seconds=0.0)
    assert hand.session.transcript.context == [*PROMPT, 1, 2]
    assert hand.session.statistics.wasted_tokens == 2
    assert not [event for event in hand.events if isinstance(event, Drafted) and event.token == 4]
    hand.decode(7, 8)
    assert hand.committed() == [(1, 2), (7, 8)]


def test_a_stale_look_up_is_dropped() -> None:
    hand = Hand(Asynchronous(speculation_stride=1))
    hand.play((1, 2), guesses=(5, 6))
    checks = hand.launch()
    hand.decode(3, 4)
    query, epoch = hand.ask(), hand.session.epoch
    hand.judge(checks, 9)
    hand.session.looked(epoch, query, hand.guess(query), seconds=0.0)
    assert len(hand.session.transcript.steps) == 1 and not hand.session.checks.queued
    assert hand.session.move is Move.DECODE


def test_verdicts_after_a_rollback_in_their_batch_judge_no_later_step() -> None:
    """Steps 2 and 3 were found right, but after a step 1 that was not the true one. What comes now are others."""
    hand = Hand(Eager(window=6))
    hand.play((1, 2), (3, 4), (5, 6), guesses=(5,) * 7)
    hand.judge(hand.launch(), 9, 5, 5)
    hand.decode(7, 8)
    hand.look()
    checks = hand.launch()
    hand.decode(1, 1)
    hand.look()
    hand.decode(2, 2)
    hand.judge(checks, 5)
    assert [(step.index, step.certain) for step in hand.session.transcript.steps] == [(3, False)]


def test_verdicts_are_applied_in_step_order_whatever_order_they_come_in() -> None:
    hand = Hand(Eager(window=6, flights=2), stride=1)
    hand.play((1,), guesses=(5,) * 4)
    first = hand.launch()
    hand.decode(2)
    hand.look()
    second = hand.launch()
    hand.decode(3)
    hand.judge(second, 8)
    assert hand.committed() == [(1,)] and hand.session.epoch == 0, "nothing is known of the step before it"
    hand.judge(first, 5)
    assert hand.committed() == [(1,), (2,)] and hand.session.epoch == 1
    hand.decode(4)
    assert hand.committed() == [(1,), (2,), (4,)]


def test_what_is_fetched_first_is_wanted_by_the_last_verdict_that_stands() -> None:
    hand = Hand(Synchronous(speculation_stride=4))
    hand.play((1, 2), (3, 4), (5, 6), (7, 8), guesses=(5, 5, 5, 5))
    hand.session.take_wanted()
    hand.judge(hand.launch(), 5, 9, 7, 8)  # the second guess is wrong, so the last two verdicts are of a wrong path
    assert hand.session.take_wanted().tolist() == [109, 105, 108, 107]
    assert not len(hand.session.take_wanted())


# Load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "speculation",
    [Synchronous(speculation_stride=4), Asynchronous(speculation_stride=4), Continuous(window=4, flights=2)],
    ids=lambda speculation: type(speculation).__name__,
)
def test_while_the_model_is_crowded_a_guess_is_checked_and_not_decoded(speculation: Arrangement) -> None:
    hand = Hand(speculation)
    hand.begin()
    hand.guesses(5)
    hand.decode(1, 2)
    hand.look()
    assert hand.session.move is Move.DECODE and hand.session.drafts
    hand.load.crowded = True
    assert hand.session.move is None
    hand.judge(hand.launch(), 5)  # due, since nothing else would bring the session on
    assert hand.session.move is Move.DECODE and not hand.session.drafts, "what is known to be right is decoded anyway"


def test_a_draft_that_was_begun_before_the_crowd_came_is_gone_on_with_when_it_is_right() -> None:
    hand = Hand(Asynchronous(speculation_stride=4))
    hand.begin()
    hand.guesses(5)
    hand.decode(1, 2)
    hand.look()
    hand.decode(3)
    hand.load.crowded = True
    assert hand.session.move is None
    hand.judge(hand.launch(), 5)
    hand.decode(4)
    assert hand.committed() == [(1, 2), (3, 4)]


# Ends ------------------------------------------------------------------------------------------------------------


def test_an_end_of_sequence_in_a_draft_is_provisional() -> None:
    hand = Hand(Asynchronous(speculation_stride=1), model=FakeModel())
    hand.play((1, 2), guesses=(5, 5))
    checks = hand.launch()
    hand.decode(END)
    assert not hand.session.final and hand.session.move is None, "no step after an end"
    hand.judge(checks, 9)
    assert hand.session.move is Move.DECODE
    hand.decode(6, 7)
    hand.look()
    hand.judge(hand.launch(), 5)
    hand.decode(END)
    assert hand.committed() == [(1, 2), (6, 7), (END,)]
    assert hand.session.status is Status.DONE and isinstance(hand.events[-1], Done)


def test_a_confirmed_end_in_a_draft_is_the_end() -> None:
    hand = Hand(Asynchronous(speculation_stride=1), model=FakeModel())
    hand.play((1, 2), guesses=(5,))
    checks = hand.launch()
    hand.decode(END)
    hand.judge(checks, 5)
    assert hand.committed() == [(1, 2), (END,)] and hand.session.status is Status.DONE


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_the_length_limit_inside_a_step(limit: int) -> None:
    hand = Hand(Sequential(), stride=2, max_new_tokens=limit)
    while not hand.session.final:
        hand.begin()
        while hand.session.move is Move.DECODE:
            hand.decode(7)
    assert [len(tokens) for tokens in hand.committed()] == [2] * (limit // 2) + [1] * (limit % 2)
    done = hand.events[-1]
    assert isinstance(done, Done) and done.statistics.new_tokens == limit and done.error is None


def test_the_first_end_wins() -> None:
    hand = Hand(Sequential())
    hand.begin()
    checks_of_an_ended_session = hand.session.next_pass()
    assert checks_of_an_ended_session is not None
    hand.session.finish(Status.CANCELLED, Cancelled("first"))
    hand.session.finish(Status.FAILED, RetrieverFailed("second"))
    hand.session.decoded(checks_of_an_ended_session, Decoded((4,), None), seconds=0.0)
    (done,) = hand.events
    assert isinstance(done, Done) and isinstance(done.error, Cancelled)
    assert hand.session.status is Status.CANCELLED and not hand.committed() and hand.session.move is None


def test_a_failure_says_why() -> None:
    with pytest.raises(AssertionError, match="why"):
        Hand(Sequential()).session.finish(Status.FAILED)


def test_a_verdict_after_the_end_changes_nothing() -> None:
    hand = Hand(Sequential())
    hand.look()
    checks = hand.launch()
    hand.session.finish(Status.CANCELLED, Cancelled("left"))
    assert hand.session.checks.flying and not hand.session.home
    hand.judge(checks, 5)
    assert not hand.session.checks.flying and len(hand.events) == 1


def test_a_reader_that_leaves_too_much_unread_stops_new_work_only() -> None:
    hand = Hand(Synchronous(speculation_stride=2), unread_limit=1)
    hand.begin()
    hand.guesses(5)
    hand.decode(1, 2)
    assert hand.session.reader.blocks and hand.session.move is None
    hand.session.reader.heard()
    assert hand.session.move is Move.LOOK


# Text ------------------------------------------------------------------------------------------------------------


class Bytes(FakeModel):
    """One token is one byte, so most characters are spread over several tokens."""

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class Blind(FakeRetriever):
    """Does not read its questions."""

    def _vector(self, text: str) -> Any:
        return np.ones(self.vectors.shape[1], dtype=np.float32)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1, max_size=12)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(text=TEXTS, stride=st.integers(1, 5))
def test_characters_are_never_split(text: str, stride: int) -> None:
    tokens = text.encode()
    hand = Hand(
        Sequential(), model=Bytes(ends=False), retriever=Blind(), stride=stride, max_new_tokens=len(tokens), drafts=True
    )
    while not hand.session.final:
        hand.begin()
        while hand.session.move is Move.DECODE:
            hand.decode(tokens[len(hand.session.transcript.context) - len(PROMPT)])
    pieces = [event.text for event in hand.events if isinstance(event, Committed)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(text=TEXTS, stride=st.integers(1, 5))
def test_drafted_characters_are_never_split(text: str, stride: int) -> None:
    """Drafts of one step after the other, all right: what was drafted is what is committed."""
    tokens = text.encode()
    hand = Hand(
        Asynchronous(speculation_stride=1), model=Bytes(ends=False), retriever=Blind(), stride=stride,
        max_new_tokens=len(tokens), drafts=True,
    )  # fmt: skip
    hand.begin()
    hand.guesses(*[5] * len(tokens))
    checks: Sequence[Check] = ()
    while not hand.session.final:
        if hand.session.move is Move.DECODE:
            hand.decode(tokens[len(hand.session.transcript.context) - len(PROMPT)])
        elif checks:
            hand.judge(checks, *[5] * len(checks))
            checks = ()
        else:
            hand.look()
        if hand.session.checks_due and not checks:
            checks = hand.launch()
    assert "".join(event.text for event in hand.events if isinstance(event, Committed)) == text
    certain = len(tokens[:stride])  # the first step was no draft
    drafted = "".join(event.text for event in hand.events if isinstance(event, Drafted))
    assert "\ufffd" not in drafted
    whole = tokens[:certain].decode(errors="replace").rstrip("\ufffd")
    assert text.endswith(drafted) and len(whole) + len(drafted) >= len(text)


def test_an_answer_that_ends_inside_a_character_says_so() -> None:
    hand = Hand(Sequential(), model=Bytes(ends=False), retriever=Blind(), max_new_tokens=2)
    hand.begin()
    hand.decode(0x41, 0xE2)
    (event, _) = hand.events
    assert isinstance(event, Committed) and event.text == "A\ufffd"


# Any order -------------------------------------------------------------------------------------------------------

SPECULATIONS: list[Arrangement] = [
    Sequential(),
    *(kind(speculation_stride=stride, prefetch=1) for kind in (Synchronous, Asynchronous) for stride in (1, 2, 4)),
    Eager(window=2),
    Eager(window=4),
    Eager(window=4, flights=3),
    Eager(window=4, token_check=True),
    Eager(window=5, flights=3, token_check=True),
    Synchronous(speculation_stride=3, prefetch=1, token_check=True),
    Continuous(window=6, flights=2),
    Continuous(window=2),
]


@settings(deadline=None, derandomize=True, max_examples=120)
@given(data=st.data())
def test_whatever_comes_home_when_the_output_is_the_oracles(data: st.DataObject) -> None:
    """Every legal order of asking and answering: results wait for as long as they like before they are applied."""
    hand = Hand(
        data.draw(st.sampled_from(SPECULATIONS), label="speculation"),
        model=FakeModel(seed=data.draw(st.integers(0, 5), label="model")),
        retriever=Scattered(documents=data.draw(st.sampled_from([2, 3, 50]), label="documents")),
        stride=data.draw(st.integers(1, 3), label="stride"),
        unread_limit=data.draw(st.sampled_from([1, 2, 100]), label="unread"),
        max_new_tokens=data.draw(st.integers(1, 9), label="tokens"),
        drafts=True,
    )
    session = hand.session
    asked: tuple[int, Query] | None = None
    made: Pass | None = None
    flying: list[Sequence[Check]] = []
    while not session.final:
        possible = []
        if asked or made:
            possible.append("answer")
        elif session.move is not None:
            possible.append("ask")
        if flying:
            possible.append("judge")
        if session.checks_due:
            possible.append("launch")
        if session.reader.unread:
            possible.append("read")
        assert possible, f"stuck: {session}"
        match data.draw(st.sampled_from(possible)):
            case "ask" if session.move is Move.LOOK:
                asked = session.epoch, hand.ask()
            case "ask":
                made = session.next_pass()
            case "answer" if asked:
                session.looked(*asked, hand.guess(asked[1]), seconds=0.0)
                asked = None
            case "answer":
                assert made is not None
                hand.say(made)
                made = None
            case "launch":
                flying.append(hand.launch())
            case "judge":
                checks = flying.pop(data.draw(st.integers(0, len(flying) - 1), label="flight"))
                rankings = hand.retriever.search([check.query for check in checks], 1)
                hand.judge(checks, *(int(ranking.ids[0]) for ranking in rankings))
            case "read":
                session.reader.heard()
        assert len(session.transcript.steps) <= session.arrangement.window
        assert session.checks.credits_out <= session.arrangement.window
        assert len(session.checks.flying) <= session.arrangement.flights
    tokens, documents = sequential(
        hand.model, hand.retriever, PROMPT,
        max_new_tokens=session.request.max_new_tokens, retrieval_stride=session.workload.retrieval_stride,
    )  # fmt: skip
    assert [token for step in hand.committed() for token in step] == tokens == session.transcript.committed
    assert [event.document.id for event in hand.events if isinstance(event, Committed)] == documents
    assert session.status is Status.DONE and isinstance(hand.events[-1], Done)


def test_who_reads_nothing_takes_the_time_until_the_end_and_none_after_it() -> None:
    hand = Hand(Sequential(), unread_limit=2)
    for hand.at in (1.0, 2.0, 3.0):
        hand.session.reader.told()
    hand.at = 5.0
    hand.session.reader.heard()
    assert hand.session.reader.blocks and hand.session.reader.away_s == 3.0
    hand.at = 6.0
    hand.session.reader.heard()
    assert hand.session.reader.away_s == 4.0, "full from the second event on, until fewer than two are left"
    hand.at = 7.0
    hand.session.reader.told()
    hand.at = 10.0
    hand.session.finish(Status.DONE)
    assert hand.session.statistics.reader_s == 7.0 and hand.session.statistics.latency_s == 10.0
    hand.at = 20.0
    for _ in range(3):
        hand.session.reader.heard()
    assert hand.session.statistics.reader_s == 7.0
