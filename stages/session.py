"""One request being served, and the only place that changes its state.

Every method is a *section*: synchronous, run on the event loop, never interrupted (rule R2). Stages and the caller's
stream call sections; after each, the `Switch` looks where the session is due next.

    moves            what the session's one turn should do now: LOOK, DECODE, or nothing
    asked, looked    Lookup takes the next query, and brings back the encoded one: a step begins, maybe with a guess
    next_pass, decoded           Generate takes one forward pass, and brings its token
    take_checks, judge           Verify takes what is due, and brings verdicts: commit, or ROLLBACK
    take_wanted, fetched         Prefetch takes ids, and brings what the cache keeps of them
    finish                       the one end
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ralmspec.retrievers.base import Ids, Query, Ranking
from ralmspec.retrievers.cache import SessionCache

from .arrangement import Arrangement, Outlook
from .messages import Check, Committed, Done, Drafted, Event, Pass, RolledBack, Turn, Verdict
from .sampling import Sampling
from .statistics import Statistics
from .trace import Trace
from .workload import BoundWorkload


class Move(Enum):
    """What a session's turn is for."""

    LOOK = "look"
    DECODE = "decode"


class Status(Enum):
    """How a session stands; everything but LIVE is final."""

    LIVE = "live"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a caller asked for. `prompt` are tokens; `deadline` is a point of the event loop's clock."""

    prompt: tuple[int, ...]
    prompt_tokens_cut: int = 0
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    end_tokens: frozenset[int] = frozenset()
    drafts: bool = False
    trace: bool = False
    deadline: float = float("inf")
    unread_limit: int = 64


@dataclass(slots=True, kw_only=True, eq=False)
class Step:
    """One retrieval and the tokens decoded under it; uncommitted as long as it stands in `Session.steps`.

    It commits when it is `certain` (its document is known right) and `complete`.
    """

    index: int
    start: int
    retrieved: Ranking | None
    certain: bool = False
    complete: bool = False
    flying: bool = False
    busy_s: float = 0.0
    tokens: list[int] = field(default_factory=list)


class Session:
    """State of one request; see the module for who calls what."""

    def __init__(
        self,
        id: int,
        request: Request,
        *,
        workload: BoundWorkload,
        arrangement: Arrangement,
        cache: SessionCache,
        render: Callable[[Sequence[int]], str],
        emit: Callable[[Event], None],
        now: Callable[[], float],
    ) -> None:
        self.id = id
        self.request = request
        self.workload = workload
        self.arrangement = arrangement
        self.cache = cache
        self.stride = arrangement.stride()
        self.epoch = 0
        self.status = Status.LIVE
        self.error: BaseException | None = None
        self.context = list(request.prompt)  # prompt, committed and drafted tokens
        self.committed: list[int] = []
        self.steps: deque[Step] = deque()
        self.checks: deque[Check] = deque()
        self.wanted: deque[Ids] = deque(maxlen=arrangement.window)
        # What is out and must come home before the slot is free (R5, R6).
        self.turn_out = False
        self.checking_out = False
        self.fetching_out = False
        self.credits_out = 0
        self.closing_out = False
        self.emitted = 0
        self.read = 0
        self.statistics = Statistics(prompt_tokens=len(request.prompt), prompt_tokens_cut=request.prompt_tokens_cut)
        self.trace = Trace(self.id) if request.trace else None
        self._steps_begun = 0
        self._complete = False  # nothing is left to decode, if every draft stands
        self._text = ""
        self._round: list[float] = []  # busy seconds of the steps decoded since the last verification
        self._render = render
        self._emit = emit
        self._now = now
        self.admitted = self.progress = now()

    # What is due ---------------------------------------------------------------------------------------------------

    @property
    def final(self) -> bool:
        """Whether the one end has come."""
        return self.status is not Status.LIVE

    @property
    def home(self) -> bool:
        """Nothing of this session is anywhere: no turn, no credit, no thread call, no event on its way (R6)."""
        out = self.turn_out or self.checking_out or self.fetching_out or self.closing_out
        return not out and not self.credits_out

    @property
    def blocked_by_reader(self) -> bool:
        """Whether the caller leaves so much unread that no new work is begun (R8)."""
        return self.emitted - self.read >= self.request.unread_limit

    @property
    def move(self) -> Move | None:
        """What the session's turn should do now; None while only a verdict or the reader can bring it on."""
        if self.final or self.blocked_by_reader:
            return None
        if not self.steps or self.steps[-1].complete:
            if self._complete or len(self.steps) >= self.arrangement.window:
                return None
            return Move.LOOK
        newest = self.steps[-1]
        if newest.retrieved is None:
            return None
        if newest.certain or self.arrangement.may_draft(self._outlook()):
            return Move.DECODE
        return None

    @property
    def checks_due(self) -> bool:
        """Whether queued checks should go to the knowledge base now."""
        room = self.arrangement.window - self.credits_out  # R5: credits of stale checks count too
        return bool(self.checks) and not self.final and room > 0 and self.arrangement.checks_due(self._outlook())

    def _outlook(self) -> Outlook:
        newest = self.steps[-1]
        return Outlook(
            queued=len(self.checks),
            flying=self.credits_out,
            newest_flying=newest.flying,
            stuck=self._complete or newest.retrieved is None,
            stride=self.stride.length,
        )

    def lost(self) -> None:
        """Count everything as home; only once no stage runs any more and nothing can come."""
        assert self.final, "a live session cannot lose what is out"
        self.turn_out = self.checking_out = self.fetching_out = self.closing_out = False
        self.credits_out = 0

    def __repr__(self) -> str:
        out = [n for n in ("turn_out", "checking_out", "fetching_out", "closing_out") if getattr(self, n)]
        return (
            f"<session {self.id} {self.status.value}: epoch {self.epoch}, {len(self.committed)} tokens committed, "
            f"{len(self.steps)} steps open, {len(self.checks)} checks queued, {self.credits_out} credits out, {out}>"
        )

    def is_stale(self, epoch: int) -> bool:
        """Whether work of that epoch is no longer wanted (R4)."""
        return self.final or epoch != self.epoch

    def returned(self, turn: Turn) -> None:
        """The session's turn at Lookup or Generate has come home."""
        self.turn_out = False
        self.progress = self._now()
        self.statistics.busy_s += self.progress - turn.issued
        if self.steps and not self.is_stale(turn.epoch):
            self.steps[-1].busy_s += self.progress - turn.issued

    def span(
        self,
        stage: str,
        start: float,
        *,
        note: str = "",
        step: int | None = None,
        made: Pass | None = None,
        stale: bool = False,
    ) -> None:
        """Note a stretch of a stage's work in the timeline, if one is kept."""
        if self.trace is None:
            return
        if made is not None:
            step, note = made.step, "stale" if stale else note
        newest = self.steps[-1].index if self.steps else self._steps_begun - 1
        self.trace.span(stage, start, self._now(), step=newest if step is None else step, epoch=self.epoch, note=note)

    # Lookup --------------------------------------------------------------------------------------------------------

    def asked(self) -> Query:
        """The query of the next step; may raise what the workload raises."""
        return self.workload.query(self.context)

    def looked(self, epoch: int, query: Query) -> None:
        """A step begins: under the cache's best guess if there is one, and with its check queued."""
        if self.is_stale(epoch):
            return
        guess = self.cache.best(query, self.workload.top_k) if self.arrangement.guesses else None
        start = len(self.context) - len(self.request.prompt)
        self.steps.append(Step(index=self._steps_begun, start=start, retrieved=guess))
        self.checks.append(Check(session=self.id, epoch=self.epoch, step=self._steps_begun, query=query))
        self._steps_begun += 1

    # Generate ------------------------------------------------------------------------------------------------------

    def next_pass(self) -> Pass | None:
        """The next forward pass, or None where the turn's reason has gone meanwhile."""
        if self.move is not Move.DECODE:
            return None
        step = self.steps[-1]
        assert step.retrieved is not None
        return Pass(
            session=self.id,
            epoch=self.epoch,
            step=step.index,
            position=step.start + len(step.tokens),
            context=tuple(self.context),
            retrieved=step.retrieved,
            sampling=self.request.sampling,
        )

    def decoded(self, made: Pass, token: int) -> None:
        """A token has come; a stale one is dropped, which is how a rollback interrupts a stride."""
        if self.is_stale(made.epoch):
            self.statistics.wasted_tokens += 1
            return
        step = self.steps[-1]
        step.tokens.append(token)
        self.context.append(token)
        ends = token in self.request.end_tokens or made.position + 1 == self.request.max_new_tokens
        step.complete = ends or len(step.tokens) == self.workload.retrieval_stride
        self._complete = ends  # provisional while the step is a draft
        if step.complete:
            self._round.append(step.busy_s)
        if self.request.drafts and not step.certain:
            text = self._render(step.tokens)[len(self._render(step.tokens[:-1])) :]
            document = self.workload.source(made.retrieved)
            self._send(Drafted, text=text, token=token, step=step.index, document=document)
        self._commit()

    # Verify --------------------------------------------------------------------------------------------------------

    def take_checks(self) -> list[Check]:
        """What is due, oldest first; a credit goes out with each (R5)."""
        if not self.checks_due:
            return []
        room = self.arrangement.window - self.credits_out
        taken = [self.checks.popleft() for _ in range(min(room, len(self.checks)))]
        for check in taken:
            self._step(check.step).flying = True
        self.credits_out += len(taken)
        self.statistics.kb_calls += 1
        self.statistics.kb_queries += len(taken)
        return taken

    def credits_returned(self, count: int) -> None:
        """Checks have come back, judged or not, stale or not."""
        self.credits_out -= count
        self.progress = self._now()

    def judge(self, verdicts: Sequence[Verdict], search_s: float) -> None:
        """Verdicts of one search, in step order: steps become certain, or the first wrong one is rolled back.

        Every document that was found enters the cache, those after a wrong guess too: a cache only guesses. The ones
        that condition a step enter now, before the session acts again; the wide rest goes through Prefetch.
        """
        self.statistics.search_s += search_s
        if self.final:
            return
        checked = matched = 0
        top_k = self.workload.top_k
        for verdict in verdicts:
            if verdict.rows is not None:
                self.cache.insert(verdict.truth.ids[:top_k], verdict.rows)
                if len(verdict.truth.ids) > top_k:
                    self.wanted.append(verdict.truth.ids[top_k:])
            if verdict.epoch != self.epoch:
                continue
            step, truth = self._step(verdict.step), verdict.truth.top(top_k)
            step.flying = False
            if step.retrieved is None:
                step.retrieved, step.certain = truth, True
            elif self.workload.agree(step.retrieved, truth):
                checked, matched = checked + 1, matched + 1
                step.retrieved, step.certain = truth, True
            else:
                checked += 1
                self._roll_back(step, truth)
        self.statistics.checked += checked
        self.statistics.matched += matched
        if checked:
            mean = sum(self._round) / len(self._round) if self._round else None
            self.stride.observe(matched=matched, checked=len(verdicts), step_s=mean, verification_s=search_s)
        self._round.clear()
        self._commit()

    def _roll_back(self, step: Step, truth: Ranking) -> None:
        """Back to the start of `step`, now under the true document (R3): a write, and never a wait."""
        self.epoch += 1
        self.statistics.rollbacks += 1
        dropped = len(self.context) - len(self.request.prompt) - step.start
        self.statistics.wasted_tokens += dropped
        del self.context[len(self.request.prompt) + step.start :]
        while self.steps[-1] is not step:
            self.steps.pop()
        self.checks.clear()
        self._steps_begun = step.index + 1
        self._complete = False
        step.retrieved, step.certain, step.complete, step.busy_s = truth, True, False, 0.0
        step.tokens.clear()
        if self.request.drafts and dropped:
            self._send(RolledBack, step=step.index, tokens=dropped, document=self.workload.source(truth))
        if self.trace:
            self.trace.mark("rollback", self._now(), step=step.index, epoch=self.epoch)

    # Prefetch ------------------------------------------------------------------------------------------------------

    def take_wanted(self) -> Ids:
        """Documents whose rows the cache should get, each once, those it already has left out."""
        wanted = dict.fromkeys(id for ids in self.wanted for id in ids.tolist() if id not in self.cache)
        self.wanted.clear()
        return np.fromiter(wanted, dtype=np.int64, count=len(wanted))

    def fetched(self, ids: Ids, rows: NDArray[Any]) -> None:
        """Rows have come; the epoch does not matter to a cache."""
        if not self.final:
            self.cache.insert(ids, rows)

    # Ends ----------------------------------------------------------------------------------------------------------

    def finish(self, status: Status, error: BaseException | None = None) -> None:
        """The one end; the first call wins (R9). A failure carries its reason."""
        if self.final:
            return
        assert status is not Status.FAILED or error is not None, "a failure must say why"
        self.status, self.error = status, error
        self.epoch += 1
        self.checks.clear()
        self.wanted.clear()
        self.steps.clear()
        self.statistics.new_tokens = len(self.committed)
        self.statistics.latency_s = self._now() - self.admitted
        self.closing_out = True
        self._emit(self.last_event())

    def last_event(self) -> Done:
        """The event that ends the caller's stream."""
        return Done(session=self.id, serial=self.emitted, statistics=replace(self.statistics), error=self.error)

    def _commit(self) -> None:
        """Move the commit horizon over every step that is certain and complete."""
        while self.steps and self.steps[0].certain and self.steps[0].complete:
            step = self.steps.popleft()
            assert step.retrieved is not None
            self.committed += step.tokens
            source = self.workload.source(step.retrieved)
            self.statistics.steps += 1
            self.statistics.documents_cut += source.tokens_cut > 0
            if self.statistics.time_to_first_token_s is None:
                self.statistics.time_to_first_token_s = self._now() - self.admitted
            self._send(Committed, text=self._new_text(), tokens=tuple(step.tokens), step=step.index, document=source)
        if self._complete and not self.steps:
            self.finish(Status.DONE)

    def _new_text(self) -> str:
        """Text that the newly committed tokens add; a character whose bytes are not all there yet waits."""
        text = self._render(self.committed)
        if not (self._complete and not self.steps):
            text = text.rstrip("\ufffd")
        new, self._text = text[len(self._text) :], text
        return new

    def _step(self, index: int) -> Step:
        return self.steps[index - self.steps[0].index]

    def _send(self, kind: Callable[..., Event], **fields: Any) -> None:
        event = kind(session=self.id, serial=self.emitted, **fields)
        self.emitted += 1
        self._emit(event)
