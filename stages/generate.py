"""Generate: one forward pass after another, for whichever sessions have their turn.

Between two passes the loop is free, so a rollback takes effect at the next token: the pass that was running is
dropped by its epoch, and the session's next pass continues the true prefix. Sessions join and leave between passes too.
"""

from collections.abc import Callable, Mapping

from .cycle import CycleStage, send_home
from .errors import ModelFailed
from .load import Load
from .messages import Decoded, Pass, Turn
from .model import Frontier, LanguageModel, Prefix
from .session import Session
from .stage import Inbox, Outbox, Worker, take
from .workload import BoundWorkload


class Generate(CycleStage[Pass, Decoded]):
    """Decodes. Every thread call is one forward pass for up to `model.max_batch` sessions.

    Steps known to be right go before drafts. If they fill a pass by themselves, `load` says so, and drafts that wait go
    home without one: their sessions then send out their checks instead. They may draft again once nobody waits.
    """

    def __init__(
        self,
        sessions: Mapping[int, Session],
        model: LanguageModel,
        workload: BoundWorkload,
        worker: Worker,
        now: Callable[[], float],
        *,
        load: Load,
    ) -> None:
        super().__init__(sessions, worker, now, batch=model.max_batch)
        self._load = load
        self._model = model
        self._workload = workload
        self._made_way = False  # some session, since all were last looked at

    async def run(self, inbox: Inbox[Turn], outbox: Outbox[Session]) -> None:
        """Serve until the inbox ends. What does not fit into a pass waits for the next, in the order of its coming."""
        waiting: list[Turn] = []
        while turns := waiting + await take(inbox, wait=False) or await self._idle(inbox, outbox):
            turns.sort(key=self._is_draft)
            served, waiting = turns[: self._batch], turns[self._batch :]
            self._load.crowded = bool(waiting) and not self._is_draft(served[-1])
            if self._load.crowded:
                self._made_way = True
                send_home([(turn, self._sessions[turn.session]) for turn in waiting if self._is_draft(turn)], outbox)
                waiting = [turn for turn in waiting if not self._is_draft(turn)]
            await self._serve(served, outbox)

    async def _idle(self, inbox: Inbox[Turn], outbox: Outbox[Session]) -> list[Turn]:
        """Nobody waits for a pass: sessions that made way for others are looked at again, before the model idles."""
        if self._made_way:
            self._made_way = self._load.crowded = False
            for session in [self._sessions[id] for id in [*self._sessions]]:
                outbox.send_nowait(session)
        return await take(inbox)

    def _is_draft(self, turn: Turn) -> bool:
        return self._sessions[turn.session].drafts

    def take(self, session: Session, turn: Turn) -> Pass | None:
        """The next forward pass."""
        return session.next_pass()

    def work(self, batch: list[Pass]) -> list[Decoded | Exception]:
        """Prefixes, one forward pass, tokens; one that can be chosen from a known frontier is part of its prefix."""
        outcomes: dict[int, Decoded | Exception] = {}
        prefixes: dict[int, Prefix] = {}
        chosen: dict[int, int] = {}
        for place, made in enumerate(batch):
            try:
                context = made.context
                if made.frontier is not None:
                    chosen[place] = token = self._choose(made, made.frontier, made.position)
                    if made.request.ends(token, made.position):
                        outcomes[place] = Decoded((token,), None)
                        continue
                    context = (*context, token)
                proposed = made.proposed or ()
                tokens = self._workload.prefix((*context, *proposed), made.retrieved)
                prefixes[place] = Prefix(session=made.session, tokens=tokens, proposed=len(proposed))
            except Exception as error:
                outcomes[place] = error
        try:
            frontiers = self._model.forward([*prefixes.values()]) if prefixes else []
        except ModelFailed:
            raise
        except Exception as error:
            raise ModelFailed(f"the forward pass raised {type(error).__name__}: {error}") from error
        if len(frontiers) != len(prefixes):
            raise ModelFailed(f"{len(prefixes)} prefixes were given, {len(frontiers)} frontiers came back")
        for place, frontier in zip(prefixes, frontiers, strict=True):
            made = batch[place]
            try:
                if isinstance(frontier, Exception):
                    raise frontier
                if frontier is not None and frontier.logits.ndim != 1:
                    raise ModelFailed(f"logits of one prefix are a row, not an array of shape {frontier.logits.shape}")
                if frontier is None:  # a part was read; the next turn goes on from what is known now
                    outcomes[place] = Decoded((), made.frontier)
                elif self._workload.asks_with_frontier:
                    outcomes[place] = Decoded((chosen[place],) if place in chosen else (), frontier)
                else:
                    outcomes[place] = Decoded(self._say(made, frontier), None)
            except Exception as error:
                outcomes[place] = error
        return [outcomes[place] for place in range(len(batch))]

    def give(self, session: Session, work: Pass, result: Decoded, turn: Turn, start: float) -> None:
        """The token joins its step, unless the pass has become stale."""
        stale = "stale" if session.is_stale(work.epoch) else ""
        session.span("generate", start, step=work.step, epoch=work.epoch, note=stale)
        session.decoded(work, result, self._now() - turn.issued)

    def bear(self, session: Session, work: Pass, fault: Exception) -> None:
        """A draft that cannot be written is given up; under what is known to be right, it is the session's end."""
        if not session.give_up_draft(work):
            raise fault

    def _say(self, made: Pass, frontier: Frontier) -> tuple[int, ...]:
        """The token for the place of each that was proposed, and the one behind them."""
        rows = [frontier.logits]
        if made.proposed:
            expected = (len(made.proposed), *frontier.logits.shape)
            if frontier.proposed is None or frontier.proposed.shape != expected:
                told = None if frontier.proposed is None else frontier.proposed.shape
                raise ModelFailed(f"logits of {len(made.proposed)} proposed tokens are {expected}, not {told}")
            rows = [*frontier.proposed, *rows]
        return tuple(self._choose(made, Frontier(row), made.position + n) for n, row in enumerate(rows))

    def _choose(self, made: Pass, frontier: Frontier, position: int) -> int:
        assert made.retrieved is not None, "a token is chosen under documents"
        return made.request.sampling.pick(self._workload.logits(frontier, made.retrieved), position)
