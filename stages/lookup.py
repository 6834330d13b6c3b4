"""Lookup: forms the next query of a session, has it encoded once, and guesses its documents.

Guesses come from the session's cache, and from a drafter, if there is one: another, faster index over the same
documents. The knowledge base's own scores decide between the two. Where an earlier search proves the cache's guess
(`SessionCache.certified`), the step needs no check.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVarTuple

import numpy as np

from ralmspec.retrievers.base import Drafter, Query, Ranking, Retriever
from ralmspec.retrievers.cache import SessionCache
from ralmspec.retrievers.errors import RetrieverFailed
from ralmspec.retrievers.ranking import rank

from .cycle import CycleStage
from .messages import Turn
from .session import Session
from .stage import Worker
from .step import Move
from .workload import BoundWorkload

Given = TypeVarTuple("Given")


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A query, and the cache to guess its documents from, if there is one; whether the drafter is to be asked too, and
    whether a proof of the guess is looked for."""

    query: Query
    cache: SessionCache | None
    drafter: bool
    prove: bool


@dataclass(frozen=True, slots=True, eq=False)
class Looked:
    """The query, encoded, and the guess, if there was anything to guess from; whether its first document is one that
    the cache did not have, and whether it is proven to be what the knowledge base would find."""

    query: Query
    guess: Ranking | None
    from_drafter: bool = False
    certified: bool = False


class Lookup(CycleStage[Question, Looked]):
    """Begins steps. One encoder call, and one search of the drafter, serve every session whose turn it is."""

    def __init__(
        self,
        sessions: Mapping[int, Session],
        retriever: Retriever,
        workload: BoundWorkload,
        worker: Worker,
        now: Callable[[], float],
        *,
        drafter: Drafter | None = None,
    ) -> None:
        super().__init__(sessions, worker, now)
        self._retriever = retriever
        self._workload = workload
        self._drafter = drafter

    def take(self, session: Session, turn: Turn) -> Question | None:
        """The next step's query, as text or as a vector."""
        if session.move is not Move.LOOK:
            return None
        arrangement = session.arrangement
        return Question(
            session.question(),
            session.cache if arrangement.guesses else None,
            drafter=self._drafter is not None and arrangement.asks_drafter,
            prove=arrangement.certified_skip,
        )

    def at_once(self, work: Question) -> Looked | None:
        """A query that brings its vector along needs no encoder, and with nothing to guess from none is looked up."""
        nothing_to_do = work.query.vector is not None and work.cache is None and not work.drafter
        return Looked(work.query, None) if nothing_to_do else None

    def work(self, batch: list[Question]) -> list[Looked | Exception]:
        """Encode, then guess; the drafter is asked where the cache's guess is not proven already."""
        bare = [question.query for question in batch if question.query.vector is None]
        try:
            encoded = iter(self._retriever.encode(bare) if bare else ())
            queries = [question.query if question.query.vector is not None else next(encoded) for question in batch]
        except RetrieverFailed:
            raise
        except Exception as error:
            raise RetrieverFailed(f"encoding a query raised {type(error).__name__}: {error}") from error
        looked = [self._guarded(self._guess, *one) for one in zip(queries, batch, strict=True)]
        unproven = {
            place: made
            for place, (made, question) in enumerate(zip(looked, batch, strict=True))
            if question.drafter and isinstance(made, Looked) and not made.certified
        }
        drafts = self._draft([made.query for made in unproven.values()])
        for (place, made), draft in zip(unproven.items(), drafts, strict=True):
            looked[place] = self._guarded(self._better, made, draft)
        return looked

    def _draft(self, queries: list[Query]) -> list[Ranking]:
        """What the drafter finds, one ranking a query."""
        if self._drafter is None or not queries:
            return []
        try:
            rankings = self._drafter.search(queries, self._workload.top_k)
            if len(rankings) != len(queries):
                raise RetrieverFailed(f"the drafter brought {len(rankings)} rankings for {len(queries)} queries")
        except RetrieverFailed:
            raise
        except Exception as error:
            raise RetrieverFailed(f"the drafter's search raised {type(error).__name__}: {error}") from error
        return rankings

    def _guess(self, query: Query, question: Question) -> Looked:
        """What the cache says."""
        if question.cache is None:
            return Looked(query, None)
        if not question.prove:
            return Looked(query, question.cache.best(query, self._workload.top_k))
        guess, certified = question.cache.certified(query, self._workload.top_k)
        return Looked(query, guess, certified=certified)

    def _better(self, looked: Looked, draft: Ranking) -> Looked:
        """The better of what cache and drafter say."""
        query, guess = looked.query, looked.guess
        if not len(draft.ids):
            return looked
        ids = draft.ids if guess is None else np.union1d(guess.ids, draft.ids)
        best = rank(ids, self._retriever.score(query, self._retriever.rows(ids)), self._workload.top_k)
        return Looked(query, best, from_drafter=guess is None or best.ids[0] != guess.ids[0])

    def _guarded(self, guess: Callable[[*Given], Looked], *given: *Given) -> Looked | Exception:
        """A guess, or the fault of this one session."""
        try:
            return guess(*given)
        except RetrieverFailed as error:
            return error
        except Exception as error:
            return RetrieverFailed(f"scoring guesses raised {type(error).__name__}: {error}")

    def give(self, session: Session, work: Question, result: Looked, turn: Turn, start: float) -> None:
        """A step begins, under the best guess if there is one."""
        session.looked(
            turn.epoch,
            result.query,
            result.guess,
            self._now() - turn.issued,
            from_drafter=result.from_drafter,
            certified=result.certified,
        )
        session.span("lookup", start, epoch=turn.epoch)
