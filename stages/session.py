"""One request being served, and the only place that changes its state.

Every method is a *section*: synchronous, run on the event loop, never interrupted (R2). Stages and the caller's stream
call sections; after each, the `Switch` looks where the session is due next.

    question, looked             Lookup takes the next query, and brings it back encoded: a step begins, maybe guessed,
                                 and without a check if the guess is proven
    next_pass, decoded           Generate takes one forward pass, and brings its token, the frontier, or what settles a
                                 doubt: commit, or ROLLBACK
    launch, take_checks, judge   the Switch sends checks that are due to Verify, which brings verdicts: commit, doubt,
                                 or ROLLBACK
    take_wanted                  Prefetch takes ids for the cache
    finish                       the one end

`move` and `checks_due` say what is due; `out` and `checks.flying` say what has not come home. Several batches of checks
may fly; their verdicts are applied in step order.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil

import numpy as np

from ralmspec.retrievers.base import Ids, Query, Ranking
from ralmspec.retrievers.cache import SessionCache

from .arrangement import Arrangement, Outlook
from .checks import Checks
from .load import Load
from .messages import Check, Decoded, Done, Event, Pass, Place, Turn, Verdict
from .pace import Pace
from .reader import Reader
from .request import Request, Status
from .statistics import Statistics
from .step import Move, Step
from .stretch import Stretches
from .trace import Trace
from .transcript import Transcript
from .workload import BoundWorkload

Reconsider = Callable[[Arrangement, Statistics], Arrangement]
NOTHING: Ids = np.empty(0, dtype=np.int64)


class Session:
    """State of one request; see the module for who calls what.

    After a stretch of steps, `reconsider` is told how the session was served and what that took, and says how it is
    served from there on. `window` is the largest of all arrangements that it may say.
    """

    def __init__(
        self,
        id: int,
        request: Request,
        *,
        workload: BoundWorkload,
        arrangement: Arrangement,
        reconsider: Reconsider,
        window: int,
        load: Load,
        cache: SessionCache,
        render: Callable[[Sequence[int]], str],
        emit: Callable[[Event], None],
        now: Callable[[], float],
    ) -> None:
        self.id = id
        self.request = request
        self.workload = workload
        self.arrangement = arrangement
        self.stretches = Stretches()
        self.load = load
        self.cache = cache
        self.epoch = 0
        self.status = Status.LIVE
        self.error: BaseException | None = None
        self.transcript = Transcript(request.prompt, workload.retrieval_stride)
        self.checks = Checks(window)
        self.wanted: deque[Ids] = deque(maxlen=window)
        self.out: set[Place] = set()  # Verify's turns are counted in `checks.flying`
        self.pace = Pace(arrangement.stride())
        self.reader = Reader(id, request, workload=workload, render=render, emit=emit, now=now)
        self.statistics = Statistics(prompt_tokens=len(request.prompt), prompt_tokens_cut=request.prompt_tokens_cut)
        self.trace = Trace(id) if request.trace else None
        self._reconsider = reconsider
        self._paces: dict[Arrangement, Pace] = {}  # of arrangements that may be taken up again
        self._now = now
        self.admitted = self.progress = now()

    # What is due, and what is out ----------------------------------------------------------------------------------

    @property
    def final(self) -> bool:
        """Whether the one end has come."""
        return self.status is not Status.LIVE

    @property
    def home(self) -> bool:
        """Nothing of this session is anywhere: no turn, no check, no thread call, no end on its way (R6)."""
        return not self.out and not self.checks.flying

    @property
    def move(self) -> Move | None:
        """What the session's turn should do now; None while only a verdict or the reader can bring it on."""
        if self.final or self.reader.blocks:
            return None
        transcript = self.transcript
        if transcript.doubted:
            return Move.DECODE
        if (newest := transcript.open_step) is None:
            if transcript.ended or self._window_full:
                return None
            return Move.DECODE if self.workload.asks_with_frontier and transcript.frontier is None else Move.LOOK
        if newest.retrieved is None:
            return None
        if newest.certain or (self._can_draft and self.arrangement.may_draft(self._outlook())):
            return Move.DECODE
        return None

    @property
    def _can_draft(self) -> bool:
        """Whether a step that is not certain may be decoded, as far as the model goes: it has time, and has not failed
        at this one."""
        return not self.load.crowded and not self.transcript.steps[-1].barred

    @property
    def drafts(self) -> bool:
        """Whether its next token would be written under a guess."""
        transcript = self.transcript
        return bool(transcript.steps) and not transcript.doubted and not transcript.steps[-1].certain

    @property
    def checks_due(self) -> bool:
        """Whether queued checks should go to the knowledge base now."""
        checks = self.checks
        if self.final or not checks.queued or checks.credits_out >= checks.window:
            return False
        return len(checks.flying) < self.arrangement.flights and self.arrangement.checks_due(self._outlook())

    @property
    def _window_full(self) -> bool:
        return len(self.transcript.steps) >= self.arrangement.window

    def _outlook(self) -> Outlook:
        newest = self.transcript.steps[-1]
        return Outlook(
            queued=len(self.checks.queued),
            flying=self.checks.credits_out,
            newest_flying=self.checks.flies(newest.index, self.epoch),
            stuck=self.transcript.ended
            or newest.retrieved is None
            or (newest.complete and self._window_full)
            or (not newest.certain and not newest.complete and not self._can_draft),
            stride=self.pace.stride.length,
        )

    def is_stale(self, epoch: int) -> bool:
        """Whether work of that epoch is no longer wanted (R4)."""
        return self.final or epoch != self.epoch

    def come_home(self, turn: Turn) -> None:
        """A turn has come home, whatever became of it; with Verify's, the credits of its checks (R5)."""
        self.progress = self._now()
        if turn.place is Place.VERIFY:
            self.checks.land(turn.checks)
        else:
            self.out.discard(turn.place)

    def write_off(self) -> None:
        """Count everything as home; only once no stage runs any more and nothing can come."""
        assert self.final, "a live session cannot write off what is out"
        self.out.clear()
        self.checks.flying.clear()

    def __repr__(self) -> str:
        out = ", ".join(sorted(place.value for place in self.out)) or "nothing"
        queued, flying = len(self.checks.queued), self.checks.credits_out
        committed, steps = len(self.transcript.committed), len(self.transcript.steps)
        return (
            f"<session {self.id} {self.status.value}: epoch {self.epoch}, {committed} tokens committed, "
            f"{steps} steps open, {queued} checks queued, {flying} flying, {out} out>"
        )

    # Lookup --------------------------------------------------------------------------------------------------------

    def question(self) -> Query:
        """The query of the next step; may raise what the workload raises."""
        return self.workload.query(self.transcript.context, self.transcript.frontier)

    def looked(
        self,
        epoch: int,
        query: Query,
        guess: Ranking | None,
        seconds: float,
        *,
        from_drafter: bool = False,
        certified: bool = False,
    ) -> None:
        """A step begins: under the best guess if there is one, and with its check queued, unless it is `certified` that
        the knowledge base would find the same. `from_drafter` tells a guess of the drafter from one of the cache."""
        self.statistics.busy_s += seconds
        if self.is_stale(epoch):
            return
        step = Step(
            index=self.transcript.begun,
            start=self.transcript.position,
            retrieved=guess,
            from_drafter=from_drafter,
            certified=certified,
            frontier=self.transcript.frontier,
            busy_s=seconds,
        )
        self.transcript.begin(step)
        if certified:
            self._settle()  # and no commit: the step has no token yet, and those before it gain nothing by it
            return
        check = Check(
            session=self.id,
            epoch=self.epoch,
            step=step.index,
            query=query,
            documents=max(self.arrangement.prefetch, self.workload.top_k),
            guess=guess,
            position=step.start,
            frontier=step.frontier,
            request=self.request,
            cache=self.cache if self.arrangement.guesses else None,
        )
        self.checks.queued.append(check)

    # Generate ------------------------------------------------------------------------------------------------------

    def next_pass(self) -> Pass | None:
        """The next forward pass, or None where the turn's reason has gone meanwhile."""
        if self.move is not Move.DECODE:
            return None
        transcript = self.transcript
        step, context, proposed = transcript.open_step, transcript.context, None
        if doubted := transcript.doubted:
            step, context = doubted, transcript.before(doubted)
            proposed = tuple(doubted.tokens[:-1] if doubted.complete else doubted.tokens)  # one more is said than that
        return Pass(
            session=self.id,
            epoch=self.epoch,
            step=step.index if step else transcript.begun,
            position=len(context) - len(self.request.prompt),
            context=tuple(context),
            retrieved=step.retrieved if step else None,
            frontier=transcript.frontier,
            request=self.request,
            proposed=proposed,
        )

    def decoded(self, made: Pass, brought: Decoded, seconds: float) -> None:
        """A pass has come home; a stale one is dropped, which is how a rollback interrupts a stride."""
        self.statistics.busy_s += seconds
        if self.is_stale(made.epoch):
            self.statistics.wasted_tokens += len(brought.tokens)
            return
        self.transcript.frontier = brought.frontier
        if not brought.tokens or made.retrieved is None:
            return
        if made.proposed is not None:
            self._resolve(brought.tokens, seconds)
        else:
            self._write(self.transcript.steps[-1], brought.tokens[0], made.retrieved, seconds)
        self._commit()

    def _write(self, step: Step, token: int, retrieved: Ranking, seconds: float) -> None:
        """The newest step gets its next token."""
        self.transcript.write(step, token, ends=self.request.ends(token, self.transcript.position))
        step.busy_s += seconds
        if step.complete:
            self.pace.completed(step.busy_s)
        if not step.settled:
            self.reader.drafted(step, self.transcript.generated, retrieved)

    def give_up_draft(self, made: Pass) -> bool:
        """A pass has failed: whether it wrote under a guess, so that the session can go on once the step is certain."""
        newest = self.transcript.steps[-1] if self.transcript.steps else None
        if made.proposed is not None or newest is None or newest.settled:
            return False
        newest.barred = True
        return True

    # Verify --------------------------------------------------------------------------------------------------------

    def launch(self) -> tuple[Check, ...]:
        """What is due leaves for the knowledge base, a credit with each; the turn at Verify brings it along."""
        return self.checks.launch()

    def take_checks(self, turn: Turn) -> tuple[Check, ...]:
        """Verify takes what was launched."""
        self.statistics.kb_calls += 1
        self.statistics.kb_queries += len(turn.checks)
        return turn.checks

    def judge(self, verdicts: Sequence[Verdict], *, search_s: float, verification_s: float) -> None:
        """Verdicts of one search: in step order, steps become certain, and the first wrong one is put in doubt; without
        the token check, or where nothing is written yet, it is rolled back.

        One that comes before those of earlier steps waits for them. `search_s` is the time of the worker's call,
        `verification_s` that from launch to verdict.
        """
        self.statistics.search_s += search_s
        self.statistics.shortest_search_s = min(self.statistics.shortest_search_s, search_s)
        if self.final:
            return
        self.checks.verdicts |= {verdict.step: verdict for verdict in verdicts if verdict.epoch == self.epoch}
        self.pace.verified(verification_s)
        applied = self._settle()
        # Last in, first fetched: what stands comes last, and the oldest are dropped beyond the window.
        for verdict in sorted(verdicts, key=lambda verdict: verdict in applied):
            if len(verdict.wanted):
                self.wanted.append(verdict.wanted)
        self._commit()

    # What becomes of steps -----------------------------------------------------------------------------------------

    def _settle(self) -> list[Verdict]:
        """Apply, in step order, the verdicts that are here, up to a step that they put in doubt. A step that needs none
        is certain once all before it are settled: until then, the context for which it was certified may still be taken
        back."""
        applied = []
        while step := self.transcript.unsettled:
            if step.certified:
                step.certain = True
                self.statistics.certified += 1  # `pace` is told of none: a stride counts checks, and this has no check
                continue
            if (verdict := self._next_verdict(step)) is None:
                break
            applied.append(verdict)
            truth = verdict.truth.top(self.workload.top_k)
            guessed, step.certain = step.retrieved is not None, True
            self.statistics.checked += guessed
            self.statistics.matched += guessed and verdict.right
            self.statistics.matched_by_drafter += step.from_drafter and verdict.right
            step.doubted = guessed and not verdict.right and self._can_be_doubted(step)
            if guessed and not step.doubted:
                self.pace.judged(verdict.right)
                if not verdict.right:
                    self._roll_back(step, truth)
            step.retrieved = truth
        return applied

    def _next_verdict(self, unsettled: Step) -> Verdict | None:
        """That of the oldest step that is not settled, if it is here. One in doubt has had its own, so those of later
        steps wait."""
        return self.checks.verdicts.pop(unsettled.index, None)

    def _can_be_doubted(self, step: Step) -> bool:
        """Whether other documents may still have led to the same tokens. Where queries need the frontier, the verdict
        has already compared them."""
        return self.arrangement.token_check and bool(step.tokens) and not self.workload.asks_with_frontier

    def _resolve(self, said: Sequence[int], seconds: float) -> None:
        """The model has said, under the true documents, what it would have written in the doubted step.

        If that is what was written, all that was drafted after it stands too, and verdicts that wait for it apply. If
        not, the step goes back to the first token that differs, and gets the true one.
        """
        step = self.transcript.steps[0]
        truth = step.retrieved
        assert step.doubted and truth is not None
        step.doubted = False
        same = next((n for n, (was, true) in enumerate(zip(step.tokens, said, strict=False)) if was != true), None)
        self.pace.judged(same is None)
        if same is None:
            self.statistics.saved += 1
            if not step.complete:
                self._write(step, said[-1], truth, seconds)
        else:
            self._roll_back(step, truth, keep=same)
            self._write(step, said[same], truth, seconds)
        self._settle()

    def _roll_back(self, step: Step, truth: Ranking, *, keep: int = 0) -> None:
        """Back to the first `keep` tokens of `step`: a write, and never a wait (R3). What is under way is stale now."""
        self.epoch += 1
        dropped = self.transcript.cut(step, keep)
        self.checks.drop()
        step.busy_s = 0.0
        self.statistics.rollbacks += 1
        self.statistics.wasted_tokens += dropped
        self.reader.retracted(step, dropped + keep, truth)
        if self.trace:
            self.trace.mark("rollback", self._now(), step=step.index, epoch=self.epoch)

    def _commit(self) -> None:
        """Move the commit horizon over every step that is certain and complete."""
        transcript, steps = self.transcript, self.statistics.steps
        while step := transcript.commit():
            assert step.retrieved is not None
            self.statistics.steps += 1
            self.statistics.documents_cut += self.workload.tokens_cut(step.retrieved) > 0
            if self.statistics.time_to_first_token_s is None:
                self.statistics.time_to_first_token_s = self._now() - self.admitted
            self.reader.committed(step, transcript.committed, step.retrieved, last=transcript.finished)
        if transcript.doubted is None:
            self.pace.learn()
        if transcript.finished:
            self.finish(Status.DONE)
        elif self.statistics.steps > steps:
            self._end_stretch()

    def _end_stretch(self) -> None:
        """Steps have been committed: if they end a stretch, the session may be served otherwise from here on. What is
        open stays as it was begun, guesses and checks too; how that goes on, the new arrangement decides."""
        so_far = replace(self.statistics, latency_s=self._now() - self.admitted, reader_s=self.reader.away_s)
        if (taken := self.stretches.committed(so_far, self._steps_left)) is None:
            return
        chosen = self._reconsider(self.arrangement, taken)
        if chosen != self.arrangement:
            self._paces[self.arrangement] = self.pace
            self.arrangement = chosen
            self.pace = self._paces.get(chosen) or Pace(chosen.stride())
            self.stretches.restart(self.transcript.begun)

    @property
    def _steps_left(self) -> int:
        """How many are not begun yet, if nothing that is written is taken back."""
        tokens = self.request.max_new_tokens - self.transcript.position
        return 0 if self.transcript.ended else ceil(tokens / self.workload.retrieval_stride)

    # Prefetch ------------------------------------------------------------------------------------------------------

    def take_wanted(self) -> Ids:
        """Documents that the cache should get, those of the last verdict first; the epoch does not matter to it."""
        wanted = np.concatenate([*reversed(self.wanted)]) if self.wanted else NOTHING
        self.wanted.clear()
        return wanted

    # Ends ----------------------------------------------------------------------------------------------------------

    def finish(self, status: Status, error: BaseException | None = None) -> None:
        """The one end; the first call wins (R9). A failure carries its reason."""
        if self.final:
            return
        assert status is not Status.FAILED or error is not None, "a failure must say why"
        self.status, self.error = status, error
        self.epoch += 1
        self.transcript.frontier = None
        self.transcript.steps.clear()
        self.checks.drop()
        self.wanted.clear()
        self.statistics.new_tokens = len(self.transcript.committed)
        self.statistics.latency_s = self._now() - self.admitted
        self.statistics.reader_s = self.reader.away_s
        self.out.add(Place.OUTPUT)
        self.reader.ended(self.last_event())

    def last_event(self) -> Done:
        """The event that ends the caller's stream."""
        return Done(session=self.id, statistics=replace(self.statistics), error=self.error)

    def span(self, stage: str, start: float, *, epoch: int, step: int | None = None, note: str = "") -> None:
        """Note a piece of a stage's work in the timeline, if one is kept."""
        if self.trace is not None:
            newest = self.transcript.begun - 1
            self.trace.span(stage, start, self._now(), step=newest if step is None else step, epoch=epoch, note=note)
