"""What a retriever promises to the rest: queries in, ranked documents out, and scores for chosen documents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Query:
    """A question to the knowledge base: the text, and its vector once somebody has encoded it.

    `vector` is float32 [dimension] for dense retrievers and stays None for sparse ones.
    """

    text: str
    vector: Vector | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Documents for one query, best first; equal scores stand in ascending id.

    `ids` int64 [n], `scores` float32 [n].
    """

    ids: Ids
    scores: Scores

    def top(self, n: int) -> "Ranking":
        """The first n documents (fewer if there are fewer)."""
        return Ranking(self.ids[:n], self.scores[:n])


@dataclass(frozen=True, slots=True)
class Document:
    """A passage of the knowledge base."""

    id: int
    title: str
    text: str


class Drafter(Protocol):
    """What guesses beside a session's cache: a faster index over the same documents, with the same ids and the same
    query vectors. Every `Retriever` is one. Its scores are not looked at: those of the knowledge base decide.

    Blocking; no two searches run at the same time.
    """

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """At most k documents for each encoded query; none is a guess too, and means no guess."""
        ...


class Retriever(Protocol):
    """A knowledge base. Every method is blocking and is called from worker threads, `document` from the loop as well.

    All of them may be called from several threads at the same time; only of `search` no more than `concurrency` run.

    Promise to speculation: `score(query, rows(ids))` equals, bit for bit, the scores that `search` reports for those
    documents, and a query's scores do not depend on the other queries of its batch. So a cache that holds the true
    first document of an exact index ranks it first too.
    """

    @property
    def description(self) -> str:
        """What a report calls this retriever: its kind, its size, and how it is searched."""
        ...

    @property
    def concurrency(self) -> int:
        """How many searches may run at the same time."""
        ...

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        """The same queries with everything computed that `search` and `score` need; done once per query."""
        ...

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The k best documents of each encoded query."""
        ...

    def rows(self, ids: Ids) -> NDArray[Any]:
        """What scoring needs to know of these documents, one row each (dense: their vectors, float32 [n, d])."""
        ...

    def score(self, query: Query, rows: NDArray[Any]) -> Scores:
        """Scores of the documents behind `rows` for one encoded query, float32 [n]. Fast: a guess takes no longer."""
        ...

    def document(self, id: int) -> Document:
        """The document itself; raises `BadKnowledge` where it cannot be read."""
        ...


class Bounding(Protocol):
    """What an exact retriever may offer besides: a bound on what a search left out, which can spare later searches."""

    def bound(self, query: Query, past: Query, found: Ranking) -> float:
        """The most that a document can score for `query`, if a search for `past`, which brought `found`, left it out.

        Both encoded. Never less than the highest of those scores, as `score` computes them; infinity where nothing is
        known, minus infinity where nothing was left out. Fast: called for several searches at every look-up.
        """
        ...


Bound = Callable[[Query, Query, Ranking], float]


def bound_of(retriever: object) -> Bound | None:
    """`Bounding.bound` of a retriever that offers it. Asked for by name, for what stands before one may delegate."""
    return cast(Bound | None, getattr(retriever, "bound", None))
