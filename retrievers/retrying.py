"""A retriever that tries again, for knowledge bases that fail now and then."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from numpy.typing import NDArray

from .base import Document, Ids, Query, Ranking, Retriever, Scores, bound_of
from .errors import BadKnowledge, MissingExtra, RetrieverFailed

LOG = logging.getLogger("ralmspec")
FINAL = (ValueError, TypeError, BadKnowledge, MissingExtra)
"""What another attempt would only raise again: the caller's mistakes, and knowledge that cannot be served as it is."""

Result = TypeVar("Result")


class Retrying:
    """Repeats `encode`, `search` and `rows` of `retriever` where they raise, up to `attempts` times in all.

    The pause before the second attempt is `first_pause_s`, and each later one is twice as long; no attempt begins later
    than `give_up_s` after the first one began. Then `RetrieverFailed` is raised from the last error. What is sure to
    fail again (`FINAL`) is not repeated: its error comes out as it is. Every repetition is logged. Pauses block, as the
    calls do, in the worker's thread, and count against `Limits.call_s` together with the attempts; a call that hangs is
    not cut short. Everything else passes through unchanged.
    """

    def __init__(
        self, retriever: Retriever, attempts: int = 3, first_pause_s: float = 0.05, give_up_s: float = 10.0
    ) -> None:
        if attempts < 1:
            raise ValueError(f"Retrying(attempts={attempts}): at least 1 is needed")
        for name, seconds in (("first_pause_s", first_pause_s), ("give_up_s", give_up_s)):
            if not seconds >= 0:
                raise ValueError(f"Retrying({name}={seconds}): must not be below 0")
        self.attempts = attempts
        self.first_pause_s = first_pause_s
        self.give_up_s = give_up_s
        self._retriever = retriever

    @property
    def description(self) -> str:
        """What a report calls this retriever."""
        return f"{self._retriever.description}; up to {self.attempts} attempts a call"

    @property
    def concurrency(self) -> int:
        """As the inner retriever has it."""
        return self._retriever.concurrency

    def __len__(self) -> int:
        return len(self._retriever)

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        """The inner retriever's answer, from the first attempt that brings one."""
        return self._persist("encoding", lambda: self._retriever.encode(queries))

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The inner retriever's answer, from the first attempt that brings one."""
        return self._persist("the search", lambda: self._retriever.search(queries, k))

    def rows(self, ids: Ids) -> NDArray[Any]:
        """The inner retriever's answer, from the first attempt that brings one."""
        return self._persist("reading rows", lambda: self._retriever.rows(ids))

    def score(self, query: Query, rows: NDArray[Any]) -> Scores:
        """As the inner retriever does it."""
        return self._retriever.score(query, rows)

    def bound(self, query: Query, past: Query, found: Ranking) -> float:
        """As the inner retriever does it, if it does."""
        bound = bound_of(self._retriever)
        return math.inf if bound is None else bound(query, past, found)

    def document(self, id: int) -> Document:
        """As the inner retriever does it."""
        return self._retriever.document(id)

    def _persist(self, what: str, call: Callable[[], Result]) -> Result:
        began, attempt, pause_s = time.monotonic(), 1, self.first_pause_s
        while True:
            try:
                return call()
            except FINAL:
                raise
            except Exception as error:
                failed = f"{what} raised {type(error).__name__}: {error}"
                spent_s = time.monotonic() - began
                if attempt == self.attempts or spent_s + pause_s > self.give_up_s:
                    raise RetrieverFailed(f"{failed} (attempt {attempt}, given up after {spent_s:.2g} s)") from error
            LOG.warning("%s; attempt %d of %d in %.2g s", failed, attempt + 1, self.attempts, pause_s)
            time.sleep(pause_s)
            attempt += 1
            pause_s *= 2
