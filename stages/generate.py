"""Generate: one forward pass after another, for whichever sessions have their turn.

Between two passes the loop is free, so a rollback takes effect at the next token: the pass that was running is
dropped by its epoch, and the session's next pass continues the true prefix.
"""

from collections.abc import Callable, Mapping

from .cycle import CycleStage
from .errors import ModelFailed
from .messages import Pass, Turn
from .model import LanguageModel, Prefix
from .session import Session
from .stage import Worker
from .workload import BoundWorkload


class Generate(CycleStage[Pass, int]):
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

    def take(self, session: Session) -> Pass | None:
        """The next forward pass."""
        return session.next_pass()

    def work(self, batch: list[Pass]) -> list[int | Exception]:
        """Prefixes, one forward pass, tokens."""
        outcomes: dict[int, int | Exception] = {}
        prefixes: dict[int, Prefix] = {}
        for place, made in enumerate(batch):
            try:
                tokens = self._workload.prefix(made.context, made.retrieved)
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
                outcomes[place] = self._workload.choose(frontier, made.retrieved, made.position, made.sampling)
            except Exception as error:
                outcomes[place] = error
        return [outcomes[place] for place in range(len(batch))]

    def give(self, session: Session, work: Pass, result: int, turn: Turn, start: float) -> None:
        """The token joins its step, unless the pass has become stale."""
        stale = "stale" if session.is_stale(work.epoch) else ""
        session.span("generate", start, step=work.step, epoch=work.epoch, note=stale)
        session.decoded(work, result, self._now() - turn.issued)
