"""Ways to break the rules R1 to R12, and who must notice. `test_mutants.py` breaks them one by one.

A mutant is made by replacing one attribute; it wraps what is there, so that it breaks one thing and keeps the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any
from weakref import WeakSet

import clocks
import pytest
import simulation
import test_certified
import test_checks
import test_crowding
import test_rules as cycle_rules
import test_rules_of_ends as end_rules
import test_rules_of_faults as fault_rules
import test_rules_of_time as time_rules
import test_session
from anyio import create_memory_object_stream
from anyio.lowlevel import checkpoint
from clients import Luck
from fakes import VirtualWorker

from ralmspec.pipeline import Limits, NotServing, SessionStream, Synchronous, runner
from ralmspec.pipeline.runner import Runner
from ralmspec.pipeline.watchdog import OnTime, Watchdog
from ralmspec.retrievers.cache import SessionCache
from ralmspec.retrievers.errors import RetrieverFailed
from ralmspec.stages import cycle, generate, switch
from ralmspec.stages.checks import Checks
from ralmspec.stages.cycle import CycleStage
from ralmspec.stages.generate import Generate
from ralmspec.stages.in_context import BoundInContext
from ralmspec.stages.load import Load
from ralmspec.stages.lookup import Looked, Lookup
from ralmspec.stages.messages import Check, Done, Place, Verdict
from ralmspec.stages.prefetch import Prefetch
from ralmspec.stages.reader import Reader
from ralmspec.stages.request import Status
from ralmspec.stages.session import Session
from ralmspec.stages.sink import Sink
from ralmspec.stages.stage import take
from ralmspec.stages.step import Step
from ralmspec.stages.switch import Switch
from ralmspec.stages.verify import Verify

Patch = pytest.MonkeyPatch
Notice = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Mutant:
    """`breaks` breaks a rule; `noticed_by` then raises."""

    rule: str
    what: str
    breaks: Callable[[Patch], None]
    noticed_by: Notice

    def __str__(self) -> str:
        return f"{self.rule} {self.what}"


def schedules() -> None:
    """Random schedules, few enough to be quick."""
    for seed in range(40):
        simulation.simulate(Luck(seed=seed))


def nothing(*arguments: Any, **named: Any) -> None:
    """What is left out."""


async def no_wait(*arguments: Any, **named: Any) -> None:
    """What is not waited for."""


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> Callable[[Patch], None]:
    """Replaces a function by `wrapper`, which gets the original first."""

    def breaks(patch: Patch) -> None:
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *arguments, **named: wrapper(original, *arguments, **named))

    return breaks


def instead(owner: Any, name: str, value: Any, raising: bool = True) -> Callable[[Patch], None]:
    """Replaces an attribute."""
    return lambda patch: patch.setattr(owner, name, value, raising=raising)


# R1, R2 ----------------------------------------------------------------------------------------------------------


async def waits_after_registering(enter: Any, self: SessionStream) -> Any:
    stream = await enter(self)
    await checkpoint()
    return stream


def registers_without_a_turn(register: Any, self: Switch, session: Session) -> Any:
    with Patch.context() as patch:
        patch.setattr(self, "send_nowait", nothing)
        return register(self, session)


def writes_from_a_thread(work: Any, self: Generate, batch: Any) -> Any:
    for made in batch:
        self._sessions[made.session].progress = 0.0
    return work(self, batch)


def lends_its_list(next_pass: Any, self: Session) -> Any:
    made = next_pass(self)
    return made and replace(made, context=self.transcript.context)


# R3, R4 ----------------------------------------------------------------------------------------------------------


def keeps_the_epoch(roll_back: Any, self: Session, step: Any, truth: Any) -> None:
    epoch = self.epoch
    roll_back(self, step, truth)
    self.epoch = epoch


def keeps_later_drafts(roll_back: Any, self: Session, step: Any, truth: Any) -> None:
    later = [other for other in self.transcript.steps if other.index > step.index]
    roll_back(self, step, truth)
    self.transcript.steps.extend(later)


def keeps_queued_checks(roll_back: Any, self: Session, step: Any, truth: Any) -> None:
    queued = list(self.checks.queued)
    roll_back(self, step, truth)
    self.checks.queued.extend(queued)


def keeps_the_text(roll_back: Any, self: Session, step: Any, truth: Any) -> None:
    context = list(self.transcript.context)
    roll_back(self, step, truth)
    self.transcript.context[:] = context


def redoes_under_the_guess(judge: Any, self: Session, *arguments: Any, **named: Any) -> None:
    epoch, guesses = self.epoch, {step.index: step.retrieved for step in self.transcript.steps}
    judge(self, *arguments, **named)
    if self.epoch > epoch and self.transcript.steps:
        self.transcript.steps[-1].retrieved = guesses[self.transcript.steps[-1].index]


def wakes_nobody(stage: type[Any]) -> Callable[[Patch], None]:
    class Deaf:
        def send_nowait(self, session: Session) -> None:
            pass

    serve = stage._serve

    async def serve_in_silence(self: Any, turns: Any, outbox: Any) -> None:
        await serve(self, turns, Deaf())

    return instead(stage, "_serve", serve_in_silence)


def heeds_stale_verdicts(judge: Any, self: Session, verdicts: Any, **named: Any) -> None:
    class Fresh(list[Any]):
        def __iter__(fresh) -> Any:
            return (replace(verdict, epoch=self.epoch) for verdict in verdicts)

    judge(self, Fresh(verdicts), **named)


def keeps_early_verdicts(self: Checks) -> None:
    self.queued.clear()


def whichever_comes(self: Session, unsettled: Step) -> Verdict | None:
    return self.checks.verdicts.popitem()[1] if self.checks.verdicts else None


# R5, R6 ----------------------------------------------------------------------------------------------------------


def keeps_credits(come_home: Any, self: Session, turn: Any) -> None:
    flying = list(self.checks.flying)
    come_home(self, turn)
    self.checks.flying = flying


def forgets_the_ended(come_home: Any, self: Session, turn: Any) -> None:
    if not self.final:
        come_home(self, turn)


def frees_at_the_end(finish: Any, self: Session, *arguments: Any) -> None:
    finish(self, *arguments)
    self.checks.flying.clear()
    self.out &= {Place.OUTPUT}


def one_flight_too_many(self: Session) -> bool:
    return bool(self.checks.queued) and not self.final and self.arrangement.checks_due(self._outlook())


def spends_what_it_has_not(self: Checks) -> tuple[Check, ...]:
    batch = tuple(self.queued)
    self.queued.clear()
    self.flying.append(batch)
    return batch


def home_without(place: Place) -> Callable[[Patch], None]:
    def home(self: Session) -> bool:
        return not self.out - {place} and (place is Place.VERIFY or not self.checks.flying)

    return instead(Session, "home", property(home))


# R7, R8 ----------------------------------------------------------------------------------------------------------


class Shorter:
    """Makes queues that are one too short."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __getitem__(self, item: Any) -> Any:
        return lambda size: self.kind[item](size - 1)


def gives_turns_twice(send: Any, self: Switch, session: Session) -> None:
    session.out -= {Place.LOOKUP, Place.GENERATE}
    send(self, session)


async def reads_without_waking(get: Any, self: Sink) -> Any:
    self._wake = nothing
    return await get(self)


def one_blocks_all(patch: Patch) -> None:
    everybody: list[Session] = []
    begin = Session.__init__

    def noted(self: Session, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        everybody.append(self)

    def any_blocks(self: Reader) -> bool:
        return any(session.reader.unread >= session.request.unread_limit for session in everybody if not session.final)

    patch.setattr(Session, "__init__", noted)
    patch.setattr(Reader, "blocks", property(any_blocks))


# R9, R10 ---------------------------------------------------------------------------------------------------------


def overwrites_the_end(finish: Any, self: Session, *arguments: Any) -> None:
    self.status = Status.LIVE
    finish(self, *arguments)


def hides_the_error(last_event: Callable[[Session], Done], self: Session) -> Done:
    return replace(last_event(self), error=None)


def ends_without_saying(finish: Any, self: Session, *arguments: Any) -> None:
    with Patch.context() as patch:
        patch.setattr(self.reader, "ended", nothing)
        finish(self, *arguments)


CALLING: WeakSet[CycleStage[Any, Any]] = WeakSet()


async def blames_everybody(call: Any, self: CycleStage[Any, Any], taken: Any) -> None:
    """Of a call that is made because another one raised."""
    if self in CALLING:
        for _, session, _ in taken:
            session.finish(Status.FAILED, RetrieverFailed("shared"))
        return
    CALLING.add(self)
    try:
        await call(self, taken)
    finally:
        CALLING.discard(self)


def dies_alone(die: Any, self: Runner, *arguments: Any) -> None:
    with Patch.context() as patch:
        patch.setattr(self, "end", nothing)
        die(self, *arguments)


def dies_in_secret(die: Any, self: Runner, *arguments: Any) -> None:
    die(self, *arguments)
    self.dead = None


def leaves_the_others_running(die: Any, self: Runner, *arguments: Any) -> None:
    with Patch.context() as patch:
        patch.setattr(self, "_scopes", [])
        die(self, *arguments)


# R11, R12 --------------------------------------------------------------------------------------------------------


def patience(seconds: float) -> Callable[[Patch], None]:
    return instead(Limits, "drain_s", property(lambda self: seconds, nothing))


def spares_the_rest(end: Any, self: Runner, session: Session, status: Any, error: Any) -> None:
    if not isinstance(error, NotServing):
        end(self, session, status, error)


def ignores_deadlines(admit: Any, self: Runner, request: Any) -> Any:
    return admit(self, replace(request, deadline=float("inf")))


def counts_the_readers_time(stalls_at: Any, self: Watchdog, session: Session) -> float:
    with Patch.context() as patch:
        patch.setattr(Reader, "blocks", property(lambda self: False))
        return float(stalls_at(self, session))


# What all of it is for -------------------------------------------------------------------------------------------


def commits_unverified(commit: Any, self: Session) -> None:
    for step in self.transcript.steps:
        step.certain |= step.complete
    commit(self)


def is_certain_at_once(looked: Any, self: Session, *arguments: Any, **named: Any) -> None:
    looked(self, *arguments, **named)
    if self.transcript.steps and self.transcript.steps[-1].certified:
        self.transcript.steps[-1].certain = True


def proves_without_what_was_found(is_proven: Any, self: SessionCache, *arguments: Any) -> Any:
    with Patch.context() as patch:
        patch.setattr(self, "_slots", lambda ids: ids)
        return is_proven(self, *arguments)


def certifies_every_guess(guess: Any, self: Lookup, query: Any, question: Any) -> Looked:
    made: Looked = guess(self, query, question)
    return replace(made, certified=made.guess is not None)


def is_never_stuck(outlook: Any, self: Session) -> Any:
    seen = outlook(self)
    return replace(seen, stuck=False) if self.load.crowded else seen


def ends_with_a_draft(decoded: Any, self: Session, *arguments: Any) -> None:
    decoded(self, *arguments)
    if self.transcript.ended:
        self.finish(Status.DONE)


def in_virtual_time(test: Callable[..., Any], *arguments: Any) -> Notice:
    """A test that is a coroutine."""
    return partial(clocks.run, partial(test, *arguments))


R = cycle_rules
E = end_rules
F = fault_rules
T = time_rules
MUTANTS = [
    Mutant("R1", "a wait after registering", around(SessionStream, "__aenter__", waits_after_registering),
           R.test_r1_a_slot_is_taken_in_one_go_or_not_at_all),
    Mutant("R1", "registered without a turn", around(Switch, "register", registers_without_a_turn),
           R.test_r1_admission_never_exceeds_the_slots),
    Mutant("R2", "a thread writes to a session", around(Generate, "work", writes_from_a_thread),
           R.test_r2_only_sections_on_the_loop_change_a_session),
    Mutant("R2", "a thread gets the session's own list", around(Session, "next_pass", lends_its_list),
           R.test_r2_only_sections_on_the_loop_change_a_session),
    Mutant("R3", "the epoch stays", around(Session, "_roll_back", keeps_the_epoch),
           R.test_r3_a_rollback_is_a_write_and_a_wake),
    Mutant("R3", "later drafts stay", around(Session, "_roll_back", keeps_later_drafts),
           R.test_r3_a_rollback_is_a_write_and_a_wake),
    Mutant("R3", "queued checks stay", around(Session, "_roll_back", keeps_queued_checks),
           R.test_r3_a_rollback_is_a_write_and_a_wake),
    Mutant("R3", "the text stays", around(Session, "_roll_back", keeps_the_text),
           R.test_r3_a_rollback_is_a_write_and_a_wake),
    Mutant("R3", "the redo is under the guess", around(Session, "judge", redoes_under_the_guess),
           R.test_r3_a_rollback_is_a_write_and_a_wake),
    *(Mutant("R3", f"{stage.__name__} wakes nobody", wakes_nobody(stage), schedules)
      for stage in (Lookup, Generate, Verify, Prefetch)),
    Mutant("R4", "nothing is stale", instead(Session, "is_stale", lambda self, epoch: False),
           R.test_r4_stale_tokens_and_look_ups_are_dropped),
    Mutant("R4", "nothing is stale, in random schedules", instead(Session, "is_stale", lambda self, epoch: False),
           schedules),
    Mutant("R4", "stale verdicts count", around(Session, "judge", heeds_stale_verdicts),
           R.test_r4_stale_verdicts_of_another_batch_are_dropped),
    Mutant("R4", "verdicts of a batch outlive its rollback", instead(Checks, "drop", keeps_early_verdicts),
           test_session.test_verdicts_after_a_rollback_in_their_batch_judge_no_later_step),
    Mutant("R4", "verdicts are applied as they come", instead(Session, "_next_verdict", whichever_comes),
           test_session.test_verdicts_are_applied_in_step_order_whatever_order_they_come_in),
    Mutant("R4", "ids are used again", instead(runner, "_SESSION_IDS", repeat(7)),
           R.test_r4_ids_are_never_used_twice),
    Mutant("R5", "credits never come home", around(Session, "come_home", keeps_credits),
           R.test_r5_credits_come_home_from_faults_and_ended_sessions),
    Mutant("R5", "credits of ended sessions never come home", around(Session, "come_home", forgets_the_ended),
           R.test_r5_credits_come_home_from_faults_and_ended_sessions),
    Mutant("R5", "credits come home before their checks", around(Session, "finish", frees_at_the_end),
           R.test_r5_credits_come_home_from_faults_and_ended_sessions),
    Mutant("R5", "checks go out without credits", instead(Checks, "launch", spends_what_it_has_not),
           test_checks.test_a_launch_spends_no_credit_that_is_out),
    Mutant("R5", "one batch too many goes out", instead(Session, "checks_due", property(one_flight_too_many)),
           partial(R.test_r5_a_session_has_at_most_k_checks_in_flight, False)),
    Mutant("R6", "the slot is free at the end", instead(Session, "home", property(lambda self: True)), schedules),
    *(Mutant("R6", f"the slot is free before {place.value} is home", home_without(place),
             partial(R.test_r6_a_slot_is_kept_until_work_is_home, out))
      for place, out in ((Place.LOOKUP, "encoder"), (Place.GENERATE, "model"), (Place.VERIFY, "index"),
                         (Place.PREFETCH, "prefetch"), (Place.OUTPUT, "output"))),
    Mutant("R6", "the slot is free while a turn is in a queue", home_without(Place.VERIFY),
           R.test_r6_a_turn_in_a_queue_is_not_home),
    Mutant("R7", "queues are one too short",
           instead(runner, "create_memory_object_stream", Shorter(create_memory_object_stream)),
           R.test_r7_queues_of_n_are_enough_for_n_sessions),
    Mutant("R7", "a full queue loses what does not fit", instead(switch, "overflow", nothing),
           R.test_r7_a_full_queue_says_so),
    Mutant("R7", "a turn is given twice", around(Switch, "send_nowait", gives_turns_twice), schedules),
    Mutant("R8", "nobody looks how much is unread", instead(Reader, "blocks", property(lambda self: False)),
           E.test_r8_a_reader_that_stays_away_pauses_its_own_session_only),
    Mutant("R8", "reading wakes nobody", around(Sink, "get", reads_without_waking),
           E.test_r8_one_event_at_a_time_is_enough),
    Mutant("load", "drafts go before certain steps",
           around(Generate, "_is_draft", lambda is_draft, self, turn: not is_draft(self, turn)),
           in_virtual_time(test_crowding.test_certain_steps_go_first_and_drafts_get_what_is_left)),
    Mutant("load", "drafts stay in a crowd", instead(generate, "send_home", nothing),
           in_virtual_time(test_crowding.test_where_certain_steps_fill_a_pass_drafts_go_home_without_one)),
    Mutant("load", "drafts that stay in a crowd never come home", instead(generate, "send_home", nothing), schedules),
    Mutant("load", "always a crowd", instead(Load, "crowded", property(lambda self: True, nothing)),
           in_virtual_time(test_crowding.test_idle_time_is_used_all_the_same, Synchronous(speculation_stride=4))),
    Mutant("load", "never a crowd", instead(Load, "crowded", property(lambda self: False, nothing)),
           in_virtual_time(test_crowding.test_where_no_guess_is_right_a_crowd_loses_next_to_nothing,
                           Synchronous(speculation_stride=4), 8)),
    Mutant("load", "a crowd outlasts its last pass",
           instead(Generate, "_idle", lambda self, inbox, outbox: take(inbox)),
           in_virtual_time(test_crowding.test_who_made_way_is_looked_at_again_before_the_model_idles)),
    Mutant("load", "in a crowd checks wait for a full stride", around(Session, "_outlook", is_never_stuck),
           partial(test_session.test_while_the_model_is_crowded_a_guess_is_checked_and_not_decoded,
                   Synchronous(speculation_stride=4))),
    Mutant("R8", "one reader pauses all", one_blocks_all,
           E.test_r8_a_reader_that_stays_away_pauses_its_own_session_only),
    Mutant("R8", "what output stages took stays unread", instead(Switch, "picked_up", nothing), schedules),
    Mutant("R9", "the last end wins", around(Session, "finish", overwrites_the_end),
           E.test_r9_the_first_end_wins_and_is_told_once),
    Mutant("R9", "a cut stream looks complete", around(Session, "last_event", hides_the_error),
           partial(E.test_r9_a_stream_that_was_cut_never_looks_complete, "fault")),
    Mutant("R9", "a cut stream looks complete, in random schedules", around(Session, "last_event", hides_the_error),
           schedules),
    Mutant("R9", "nobody is told", around(Session, "finish", ends_without_saying),
           partial(E.test_r9_a_stream_that_was_cut_never_looks_complete, "done")),
    Mutant("R9", "leaving is no end", instead(SessionStream, "__aexit__", no_wait),
           E.test_r9_leaving_the_block_is_an_end),
    Mutant("R10", "one session's fault is the batch's",
           instead(cycle._fault_of, "__exit__", lambda *arguments: False),
           partial(F.test_r10_one_sessions_fault_is_its_own, "score")),
    Mutant("R10", "a batch's fault is the engine's", instead(cycle, "FATAL", (Exception,)),
           partial(F.test_r10_only_who_fails_alone_fails, "index", 1)),
    *(Mutant("R10", f"a shared call's fault in the {stage} thread is everybody's",
             around(CycleStage, "_call", blames_everybody),
             partial(F.test_r10_a_shared_call_that_raises_is_repeated_for_each_alone, stage))
      for stage in ("encoder", "model", "index")),
    Mutant("R10", "what is stale is repeated too", instead(Session, "is_stale", lambda self, epoch: False),
           partial(F.test_r10_whoever_is_not_there_any_more_is_left_out, "model")),
    Mutant("R10", "what is late is repeated too",
           instead(OnTime, "__getitem__", lambda self, id: self._live[id]),
           F.test_r10_a_deadline_that_passes_while_others_are_repeated_is_kept),
    Mutant("R10", "what is lost is repeated too", instead(cycle, "FATAL", ()),
           F.test_r10_of_a_call_that_is_lost_nothing_is_repeated),
    Mutant("R10", "rows that cannot be prefetched are a fault", instead(Prefetch, "bear", CycleStage.bear),
           partial(F.test_r10_only_who_fails_alone_fails, "prefetch", 1)),
    Mutant("R10", "a death fails nobody", around(Runner, "_die", dies_alone),
           F.test_r10_readers_are_told_of_a_death_at_once),
    Mutant("R10", "a death stays secret", around(Runner, "_die", dies_in_secret),
           partial(F.test_r10_a_dead_stage_fails_all, "Verify", False)),
    Mutant("R10", "the other stages live on", around(Runner, "_die", leaves_the_others_running),
           partial(F.test_r10_a_dead_stage_fails_all, "Verify", False)),
    Mutant("R10", "the dead are not buried", instead(Runner, "_bury", nothing),
           partial(F.test_r10_a_dead_stage_fails_all, "Verify", False)),
    Mutant("R10", "readiness says yes", instead(Runner, "accepting", property(lambda self: True)),
           partial(F.test_r10_a_dead_stage_fails_all, "Verify", False)),
    Mutant("R11", "the door stays open",
           instead(Runner, "_accepting", property(lambda self: True, nothing), raising=False),
           T.test_r11_draining_lets_sessions_end_and_nobody_in),
    Mutant("R11", "sessions may not end", patience(1e-3), T.test_r11_draining_lets_sessions_end_and_nobody_in),
    Mutant("R11", "patience has no end", patience(float("inf")),
           T.test_r11_then_the_rest_is_ended_and_thread_calls_are_waited_for),
    Mutant("R11", "the rest is not ended", around(Runner, "end", spares_the_rest),
           T.test_r11_then_the_rest_is_ended_and_thread_calls_are_waited_for),
    Mutant("R11", "calls are not waited for", instead(Runner, "_emptied", no_wait),
           T.test_r11_then_the_rest_is_ended_and_thread_calls_are_waited_for),
    Mutant("R12", "the watchdog sleeps", instead(Watchdog, "_stalls_at", lambda self, session: float("inf")),
           T.test_r12_a_session_without_progress_is_failed_in_time),
    Mutant("R12", "the reader's time counts", around(Watchdog, "_stalls_at", counts_the_readers_time),
           T.test_r12_the_time_a_reader_stays_away_does_not_count),
    Mutant("R12", "deadlines pass", around(Runner, "admit", ignores_deadlines), T.test_r12_deadlines_come_in_time),
    Mutant("R12", "hung calls go unnoticed", instead(VirtualWorker, "oldest_call", lambda self: float("inf")),
           partial(T.test_r12_a_hung_call_is_the_death_of_the_engine, "model", True)),
    Mutant("R12", "hung calls are waited for", instead(VirtualWorker, "abandon", nothing),
           partial(T.test_r12_draining_waits_for_a_hung_call_until_the_deadline_only, "model")),
    Mutant("promise 1", "drafts are committed unverified", around(Session, "_commit", commits_unverified), schedules),
    Mutant("promise 1", "an end in a draft is final", around(Session, "decoded", ends_with_a_draft), schedules),
    Mutant("promise 1", "a proof does without what its search found",
           around(SessionCache, "_is_proven", proves_without_what_was_found),
           test_certified.test_what_was_found_must_be_here_all_of_it),
    Mutant("promise 1", "every guess is certified", around(Lookup, "_guess", certifies_every_guess), schedules),
    Mutant("promise 1", "what is certified is certain before its context is",
           around(Session, "looked", is_certain_at_once),
           test_certified.test_a_proof_holds_for_its_context_only),
    Mutant("promise 1", "every guess is right", instead(BoundInContext, "agree", lambda *arguments: True), schedules),
]  # fmt: skip
