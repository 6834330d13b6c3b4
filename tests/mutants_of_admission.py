"""Ways to break what admission, deadlines and the waiting room promise, and who must notice. See `mutants.py`."""

import sys
from collections import deque
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import test_admission as admission_rules
import test_faults_of_time as faults
import test_leaving_the_room as leaving_rules
import test_rules as cycle_rules
from mutants import Mutant, Patch, around, instead, nothing

from ralmspec.pipeline import Limits, watchdog
from ralmspec.pipeline.admission import Admission, _Place
from ralmspec.pipeline.watchdog import OnTime


def calls_whoever_fits(self: Admission) -> None:
    fitting = [place for place in self._places if self._fits(place.need)]
    for place in fitting[:1]:
        place.called.set()


class Lifo(deque[Any]):
    append = deque.appendleft


def last_come_first_served(refuse: Any, self: Admission, *arguments: Any) -> None:
    refuse(self, *arguments)
    if not isinstance(self._places, Lifo):
        self._places = Lifo(self._places)


async def forgets_the_deadline(let_in: Any, self: Admission, request: Any, begin: Any) -> Any:
    return await let_in(self, replace(request, deadline=float("inf")), begin)


async def leaves_its_place(let_in: Any, self: Admission, request: Any, begin: Any) -> Any:
    try:
        return await let_in(self, request, begin)
    except BaseException:
        self._places.append(_Place(1))
        raise


async def begins_all_the_same(let_in: Any, self: Admission, request: Any, begin: Any) -> Any:
    try:
        return await let_in(self, request, begin)
    except anyio.get_cancelled_exc_class():
        begin()
        raise


def takes_the_call_along(call_first: Any, self: Admission) -> None:
    if sys.exc_info()[0] is None:
        call_first(self)


def never_gives_back(patch: Patch) -> None:
    held: Any = Admission.__dict__["_held"]
    most: dict[Admission, int] = {}

    def most_ever_held(self: Admission) -> int:
        most[self] = max(most.get(self, 0), held.fget(self))
        return most[self]

    patch.setattr(Admission, "_held", property(most_ever_held))


A = admission_rules
L = leaving_rules
MUTANTS = [
    Mutant("R1", "the slot is taken unchecked", instead(Admission, "_fits", lambda self, need: True),
           cycle_rules.test_r1_admission_never_exceeds_the_slots),
    Mutant("R1", "KV memory is not looked at", instead(Admission, "_held", property(lambda self: 0)),
           A.test_kv_memory_bounds_who_is_live),
    Mutant("R1", "the waiting room has no walls", instead(Admission, "refuse_if_hopeless", nothing),
           partial(A.test_a_full_room_refuses_at_once, 2)),
    Mutant("R1", "whoever fits is called", instead(Admission, "_call_first", calls_whoever_fits),
           A.test_a_large_request_is_not_overtaken),
    Mutant("R1", "who came last is first", around(Admission, "refuse_if_hopeless", last_come_first_served),
           A.test_who_finds_no_slot_waits_and_is_let_in_in_the_order_of_coming),
    Mutant("R1", "a cut leaves its place taken", around(Admission, "let_in", leaves_its_place),
           partial(L.test_a_cut_at_every_suspension_leaves_nothing_in_the_room, "scope")),
    Mutant("R1", "who was cut in the room begins all the same", around(Admission, "let_in", begins_all_the_same),
           partial(L.test_a_cut_at_every_suspension_leaves_nothing_in_the_room, "scope")),
    Mutant("R1", "who is cut takes the call along", around(Admission, "_call_first", takes_the_call_along),
           L.test_the_first_in_the_room_may_be_cut_in_the_moment_in_which_it_is_called),
    Mutant("R1", "the deadline does not pass in the room", around(Admission, "let_in", forgets_the_deadline),
           A.test_the_deadline_counts_from_entering_and_passes_in_the_room),
    Mutant("R1", "hopeless waits are waited for", instead(Admission, "_expected_wait_s", lambda self, need: None),
           A.test_a_hopeless_wait_is_refused_at_once),
    Mutant("R1", "patience has no end", instead(Limits, "patience_s", property(lambda self: float("inf"), nothing)),
           A.test_nobody_is_let_wait_for_longer_than_the_pipelines_patience),
    Mutant("R6", "a free slot calls nobody", instead(Admission, "released", nothing),
           A.test_who_finds_no_slot_waits_and_is_let_in_in_the_order_of_coming),
    Mutant("R6", "KV memory is never given back", never_gives_back, A.test_kv_memory_bounds_who_is_live),
    Mutant("R11", "who waits is not told", instead(Admission, "close", nothing),
           L.test_draining_tells_who_waits_at_once),
    Mutant("R12", "work is begun when it is too late",
           instead(OnTime, "__getitem__", lambda self, id: self._live[id]),
           faults.test_f17_no_work_begins_after_the_deadline),
    Mutant("R12", "a pause counts as a delay", instead(watchdog, "PAUSE_S", float("inf")),
           faults.test_f21_a_clock_that_jumps_moves_only_deadlines),
]  # fmt: skip
