"""One client of a stress run: it comes, tries until it is let in, reads or gives up, and checks what it was given.

Times are read from `perf_counter`: some event loops look at their clock once in a turn, and only to the millisecond.
"""

import random
from dataclasses import dataclass
from time import perf_counter

import anyio
from anyio.abc import TaskGroup

from ralmspec.retrievers.errors import RalmspecError
from ralmspec.stages.messages import Committed, Done

from .errors import Cancelled, Overloaded
from .pipeline import Pipeline
from .stream import SessionStream
from .stress_oracle import Oracle
from .stress_tally import Fate, Seen, Tally
from .traffic import GivesUp, Visit

SLOW_READ_S = 0.1
"""What a slow reader takes to read an event, on average."""


@dataclass(slots=True)
class Client:
    """Attends to visits, any number at a time. `tasks` holds what outlives a visit for a moment."""

    pipeline: Pipeline
    oracle: Oracle
    tally: Tally
    tasks: TaskGroup
    retries: int
    deadline_s: float
    chance: random.Random

    async def attend(self, visit: Visit) -> float:
        """From arrival to end; how many seconds a client that was refused was told to stay away, else 0.

        Whatever happens is accounted for; nothing is raised but the caller's own cancelling.
        A session must end with `Done` or an error of this library: anything else is lost, and so is one whose client
        had to be cancelled because nothing came any more.
        """
        seen = Seen(arrived=perf_counter())
        pause = 0.0
        fate, why = Fate.LOST, "no end"
        try:
            fate, why, pause = await self._try(visit, seen)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        finally:
            limit = visit.max_new_tokens if fate is Fate.COMPLETED else None
            mismatch = self.oracle.mismatch(visit.prompt, seen.steps, limit)
            self.tally.end(fate, why, seen, mismatch, perf_counter())
        return pause

    async def _try(self, visit: Visit, seen: Seen) -> tuple[Fate, str, float]:
        pause = 0.0
        for attempt in range(self.retries + 1):
            entered = perf_counter()
            try:
                return *await self._served(visit, seen), 0.0
            except Overloaded as refusal:
                self.tally.refused(perf_counter() - entered)
                pause = refusal.retry_after_s * 2**attempt * self.chance.uniform(0.5, 1.5)
            except Cancelled:
                return (Fate.FAILED, "Cancelled", 0.0) if visit.gives_up is None else (Fate.CANCELLED, "", 0.0)
            except RalmspecError as error:
                return Fate.FAILED, type(error).__name__, 0.0
            if attempt < self.retries:
                self.tally.retries += 1
                await anyio.sleep(pause)
        return Fate.REFUSED, "", pause

    async def _served(self, visit: Visit, seen: Seen) -> tuple[Fate, str]:
        stream = self.pipeline.session(
            self.oracle.prompts[visit.prompt],
            max_new_tokens=visit.max_new_tokens,
            sampling=self.oracle.sampling,
            deadline_s=self.deadline_s,
        )
        after_s = visit.after * self.tally.usual_s
        if visit.gives_up is GivesUp.CANCELS:
            self.tasks.start_soon(_cancel, stream, after_s)
        with anyio.move_on_after(after_s if visit.gives_up is GivesUp.IS_CANCELLED else float("inf")):
            async with stream:
                try:
                    return await self._read(stream, visit, seen)
                finally:
                    self.tally.took(stream.statistics)
        return Fate.CANCELLED, ""

    async def _read(self, stream: SessionStream, visit: Visit, seen: Seen) -> tuple[Fate, str]:
        enough = int(visit.after * visit.max_new_tokens) if visit.gives_up is GivesUp.LEAVES else visit.max_new_tokens
        if visit.gives_up is GivesUp.LEAVES and not enough:
            return Fate.CANCELLED, ""
        async for event in stream:
            if isinstance(event, Committed):
                seen.take(event, perf_counter())
                self.tally.tokens += len(event.tokens)
                if visit.gives_up is GivesUp.LEAVES and seen.tokens >= enough:
                    return Fate.CANCELLED, ""
            elif isinstance(event, Done):
                return Fate.COMPLETED, ""
            if visit.slow:
                await anyio.sleep(self.chance.expovariate(1 / SLOW_READ_S))
        return Fate.LOST, "the stream stopped without Done"


async def _cancel(stream: SessionStream, after_s: float) -> None:
    await anyio.sleep(after_s)
    stream.cancel()  # harmless after the end, and before the beginning
