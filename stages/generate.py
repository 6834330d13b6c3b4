"""Generate: one forward pass after another, for whichever sessions have their turn.

Between two passes the loop is free, so a rollback takes effect at the next token: the pass that was running is
dropped by its epoch, and the session's next pass continues the true prefix.
"""

from collections.abc import Callable, Mapping

from .cycle import CycleStage
from .errors import ModelFailed
from .messages import Decoded, Pass, Turn
from .model import Frontier, LanguageModel, Prefix
from .session import Session
from .stage import Worker
from .workload import BoundWorkload


class Generate(CycleStage[Pass, Decoded]):
    """Decodes. Every thread call is one forward pass for up to `model.max_batch` sessions."""

    def __init__(
        self,
        sessions: Mapping[int, Session],
        model: LanguageModel,
        workload: BoundWorkload,
        worker: Worker,
        now: Callable[[], float],
    ) -> None:
        super().__init__(sessions, worker, now, batch=model.max_batch)
        self._model = model
        self._workload = workload

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
                    chosen[place] = token = self._choose(made, made.frontier)
                    if made.request.ends(token, made.position):
                        outcomes[place] = Decoded(token, None)
                        continue
                    context = (*context, token)
                tokens = self._workload.prefix(context, made.retrieved)
                prefixes[place] = Prefix(session=made.session, tokens=tokens)
            except Exception as error:
                outcomes[place] = error
        try:
            frontiers = self._model.forward([*prefixes.values()]) if prefixes else []
        except ModelFailed:
            raise
        except Exception as error:
            raise ModelFailed(f"the forward pass raised {type(error).__name__}: {error}") from error
        for place, frontier in zip(prefixes, frontiers, strict=True):
            made = batch[place]
            try:
                if self._workload.asks_with_frontier:
                    outcomes[place] = Decoded(chosen.get(place), frontier)
                else:
                    outcomes[place] = Decoded(self._choose(made, frontier), None)
            except Exception as error:
                outcomes[place] = error
        return [outcomes[place] for place in range(len(batch))]

    def give(self, session: Session, work: Pass, result: Decoded, turn: Turn, start: float) -> None:
        """The token joins its step, unless the pass has become stale."""
        stale = "stale" if session.is_stale(work.epoch) else ""
        session.span("generate", start, step=work.step, epoch=work.epoch, note=stale)
        session.decoded(work, result, self._now() - turn.issued)

    def _choose(self, made: Pass, frontier: Frontier) -> int:
        assert made.retrieved is not None, "a token is chosen under documents"
        return made.request.sampling.pick(self._workload.logits(frontier, made.retrieved), made.position)
