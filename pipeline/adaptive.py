"""The arrangement that has been serving fastest, for every stretch of steps anew."""

from collections import deque
from collections.abc import Sequence
from math import ceil
from statistics import fmean

from ralmspec.stages.arrangement import Arrangement
from ralmspec.stages.request import Request
from ralmspec.stages.statistics import Statistics
from ralmspec.stages.stride import OS3

from .arrangements import Continuous, Sequential, Synchronous

_TIE = 1.05
"""Means of eight stretches or fewer that differ by no more than this are as good as equal."""


class Adaptive:
    """Serves every stretch of a session in the arrangement whose last stretches took the least time a step.

    Which one that is depends on what no formula of a and b knows: whether searching and decoding share cores or memory,
    how many sessions there are, how often guesses are right. So it is measured. `choices` are tried in their order,
    the first one at once; another only if it could be faster, by what is known of a and b, and then by one stretch in
    eight until it has a result. A trial costs the steps that are open when it begins and sixteen more (`Stretches`),
    and a session that is served badly need not go on so. The second best is looked at again from time to time, if it is
    close. Put what works least last: of choices that take the same but for a twentieth, more than which a few stretches
    cannot tell, the last one serves. Sessions of other lengths are another matter, since a short one waits for the last
    verification as long as a long one does: what is learned holds for requests of about as many `max_new_tokens`.

    Where sessions wait for their searches no more than a twentieth of the time that their work takes, as when many of
    them keep the model busy, there is nothing to win and nothing is tried: the last choice serves.

    Without `choices`: `Continuous`, `Synchronous` with OS3 whose γ is not cut at 0.6, and `Sequential`, for searches so
    cheap that guessing costs more than it saves. `prefetch` is that of the first two.

    The last stretch of a session that fails or is given up teaches it nothing, that of one that misses its deadline or
    stalls does, and while a session waits for its reader, no time counts. It remembers what it has learned as long as
    it lives; give every pipeline its own.
    """

    def __init__(self, choices: Sequence[Arrangement] = (), *, prefetch: int = 256) -> None:
        self._choices = tuple(choices) or (
            Continuous(prefetch=prefetch),
            Synchronous(
                speculation_stride=OS3(gamma_max=0.99, window=20),
                prefetch=prefetch,
                token_check=True,
                certified_skip=True,
            ),
            Sequential(),
        )
        self.window = max(choice.window for choice in self._choices)
        self.flights = max(choice.flights for choice in self._choices)
        self._ledgers: dict[int, _Ledger] = {}

    def __repr__(self) -> str:
        return f"Adaptive({', '.join(map(repr, self._choices))})"

    def choose(self, request: Request) -> Arrangement:
        """The fastest so far, or one that might be faster still."""
        return self._ledger(request).choose()

    def learn(self, request: Request, arrangement: Arrangement, statistics: Statistics) -> None:
        """Take in what a stretch took."""
        if statistics.latency_s:
            self._ledger(request).note(arrangement, statistics)

    def _ledger(self, request: Request) -> "_Ledger":
        return self._ledgers.setdefault(request.max_new_tokens.bit_length(), _Ledger(self._choices))


class _Ledger:
    """What stretches of sessions of about one length took in each of the choices."""

    def __init__(self, choices: Sequence[Arrangement]) -> None:
        self._seconds: dict[Arrangement, deque[float]] = {choice: deque(maxlen=8) for choice in choices}  # a step
        self._chosen: dict[Arrangement, int] = {}  # when last, counted in calls of choose
        self._hopeless: dict[Arrangement, int] = {}  # how often it took too long for any step at all, lately
        self._count = 0
        self._steps = 0  # of a stretch
        self._step_s = self._search_s = 0.0
        self._shortest_s = 0.0  # a search, at least
        self._waited_s = 0.0  # for searches, a step: what hiding them could save

    def choose(self) -> Arrangement:
        self._count += 1
        chosen = self._choose()
        self._chosen[chosen] = self._count
        return chosen

    def note(self, arrangement: Arrangement, statistics: Statistics) -> None:
        if not statistics.steps:  # nothing was committed before the deadline
            self._hopeless[arrangement] = self._hopeless.get(arrangement, 0) + 1
            return
        self._hopeless.pop(arrangement, None)
        self._seconds[arrangement].append((statistics.latency_s - statistics.reader_s) / statistics.steps)
        self._steps = statistics.steps
        self._step_s = statistics.busy_s / statistics.steps
        self._shortest_s = statistics.shortest_search_s
        # What is on its way when a stretch ends is counted as a call and not yet as time.
        self._search_s = max(statistics.search_s / max(statistics.kb_calls, 1), self._shortest_s)
        # In a stretch without guesses, all that is neither work nor its reader's is waiting for a search.
        idle_s = statistics.latency_s - statistics.reader_s - statistics.busy_s
        self._waited_s = max(self._search_s, idle_s / statistics.steps)

    def _choose(self) -> Arrangement:
        known = [choice for choice, seconds in self._seconds.items() if seconds]
        idlest = [*self._seconds][-1]  # what works least stands last
        if not known:
            return next((choice for choice in self._seconds if choice not in self._hopeless), idlest)
        if self._waited_s <= (_TIE - 1) * self._step_s and idlest not in self._hopeless:
            return idlest
        fastest = min(map(self._typical, known))
        best = next(choice for choice in reversed(known) if self._typical(choice) <= _TIE * fastest)
        for choice, seconds in self._seconds.items():
            rest = 16 * self._hopeless.get(choice, 0) or 8
            if not seconds and self._rested(choice, rest) and self._could_win(choice, best):
                return choice
        second = min((choice for choice in known if choice != best), key=self._typical, default=best)
        close = self._typical(second) < 1.25 * self._typical(best)
        # The more is known of it, the less often it is tried again: after 2, 8, 18, ... 128 stretches.
        return second if close and self._rested(second, 2 * len(self._seconds[second]) ** 2) else best

    def _typical(self, choice: Arrangement) -> float:
        """Of four or more the quickest and the slowest are left out: something else may have slowed one. But the last
        stretch of a session also waits for its last verdicts, which is to count."""
        seconds = sorted(self._seconds[choice])
        return fmean(seconds[1:-1] if len(seconds) >= 4 else seconds)

    def _rested(self, choice: Arrangement, calls: int) -> bool:
        return self._count - self._chosen.get(choice, -calls) >= calls

    def _could_win(self, choice: Arrangement, best: Arrangement) -> bool:
        """Whether a stretch might take less than in the best: the work of its steps, and the searches it cannot do
        without, one for the stride it begins with and one for every window, as the last one measured them; less a
        quarter, since each may have slowed the other down. Who never guesses has one query in each search, the
        shortest, and is spared look-ups and wasted passes as well: less two fifths."""
        searches = 1 + ceil(max(self._steps - choice.stride().length, 0) / choice.window)
        share, search_s = (0.75, self._search_s) if choice.guesses else (0.6, self._shortest_s)
        return share * (self._step_s + searches / self._steps * search_s) < self._typical(best)
