"""Where a guess at a step's document can come from, tried along a recorded path: session caches and their additions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ralmspec.retrievers.base import Ids, Query, Ranking, Retriever, bound_of
from ralmspec.retrievers.cache import SessionCache

from .locality import Path, PathStep, Walker


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached:
    """A session's cache that holds the first `prefetch` documents of every search so far.

    `neighbours`: with each of them the documents whose ids are one lower and one higher: the passages beside it, where
    passages are numbered along the text.
    """

    prefetch: int
    neighbours: bool = False

    def takes_in(self, ranking: Ranking, documents: int) -> Ids:
        """What of a search goes into the cache, of so many documents that there are, best first."""
        found = ranking.top(self.prefetch).ids
        if not self.neighbours:
            return found
        beside = np.concatenate([found, found - 1, found + 1])
        return beside[(beside >= 0) & (beside < documents)]

    def guesses(self, path: Path, retriever: Retriever, capacity: int) -> list[Ranking]:
        """A guess for every step but the first, from a cache that knows all searches before it."""
        cache, made = SessionCache(retriever, capacity), []
        for step in path.steps:
            if (guess := cache.best(step.query)) is not None:
                made.append(guess)
            self.learn(cache, step.wide, retriever)
        return made

    def learn(self, cache: SessionCache, ranking: Ranking, retriever: Retriever) -> None:
        """Put what a search brought into the cache."""
        ids = self.takes_in(ranking, len(retriever))
        cache.insert(ids, retriever.rows(ids))


@dataclass(slots=True)
class Drafts:
    """Steps decoded under guessed documents; each pair of step and document is decoded once."""

    walker: Walker
    path: Path
    _made: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def of(self, number: int, guess: Ranking) -> tuple[int, ...]:
        """The tokens of this step of the path, had it stood under the guess."""
        step, key = self.path.steps[number], (number, int(guess.ids[0]))
        if key not in self._made:
            self._made[key] = self.walker.draft(self.path.context[: step.begins], guess, len(step.tokens))
        return self._made[key]

    def surviving(self, number: int, guess: Ranking) -> int:
        """How many of them, from the first on, equal the true ones."""
        pairs = zip(self.of(number, guess), self.path.steps[number].tokens, strict=True)
        return next((same for same, (one, other) in enumerate(pairs) if one != other), len(self.of(number, guess)))


def in_strides(
    path: Path, drafts: Drafts, cached: Cached, capacity: int, *, stride: int, wrong_paths: bool
) -> list[bool]:
    """Whether each judged guess was right where verification is synchronous with a fixed speculation stride.

    A round begins at a step whose document is known; the guesses at the `stride` steps after it are made from one cache
    and then checked together, up to the first wrong one, where the next round begins. So a guess knows less than in
    `Cached.guesses`. With `wrong_paths`, the cache also takes in what was found by the queries that were formed after a
    wrong guess: on text drafted under it, and under the guesses after it, to the end of the stride.
    """
    retriever = drafts.walker.engine.index
    cache, judged = SessionCache(retriever, capacity), list[bool]()
    cached.learn(cache, path.steps[0].wide, retriever)
    at = 0
    while at + 1 < len(path.steps):
        end = min(at + stride, len(path.steps) - 1)
        stray: Sequence[Query] = ()
        for number in range(at + 1, end + 1):
            guess = _best(cache, path.steps[number].query)
            judged.append(int(guess.ids[0]) == path.steps[number].document)
            if not judged[-1]:
                stray = _wrong_path(drafts, cache, number, guess, end - number) if wrong_paths else ()
                break
        if stray:  # first, so as not to stay the longest
            for ranking in retriever.search(stray, cached.prefetch):
                cached.learn(cache, ranking, retriever)
        for step in path.steps[at + 1 : number + 1]:
            cached.learn(cache, step.wide, retriever)
        at = number
    return judged


def _wrong_path(drafts: Drafts, cache: SessionCache, number: int, guess: Ranking, depth: int) -> list[Query]:
    """So many queries that are formed after this step was drafted under a wrong guess."""
    walker, path = drafts.walker, drafts.path
    if not depth:
        return []
    context = [*path.context[: path.steps[number].begins], *drafts.of(number, guess)]
    queries = [walker.ask(context)]
    while len(queries) < depth:
        context += walker.draft(context, _best(cache, queries[-1]), walker.workload.retrieval_stride)
        queries.append(walker.ask(context))
    return queries


def _best(cache: SessionCache, query: Query) -> Ranking:
    guess = cache.best(query)
    assert guess is not None, "the cache knows the first search"
    return guess


def certified(path: Path, retriever: Retriever, widths: Sequence[int]) -> list[list[int]]:
    """For every step but the first, the widths at which no search was needed to be sure of its document.

    That is so if, of what an earlier search with so many results found, something scores more for the step's query
    than anything can that the search left out: `SessionCache.certified` where only that search is in the cache. Tried
    for each of the last four searches, of which the cache keeps more; the retriever must be `Bounding`.
    """
    bound = bound_of(retriever)
    assert bound is not None, "nothing is known of what a search left out"
    certain: list[list[int]] = []
    for number, step in enumerate(path.steps[1:], start=1):
        sure = set[int]()
        for earlier in path.steps[max(0, number - 4) : number]:
            asked = retriever.score(step.query, retriever.rows(earlier.wide.ids))
            for width in (width for width in widths if width <= len(asked)):
                if float(asked[:width].max()) > bound(step.query, earlier.query, earlier.wide.top(width)):
                    sure.add(width)
        certain.append(sorted(sure))
    return certain


def _unit(query: Query) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    assert query.vector is not None, "a dense retriever encodes queries"
    vector = query.vector.astype(np.float64)
    return np.asarray(vector / np.linalg.norm(vector))


def drift(path: Path) -> list[float]:
    """Cosines of the consecutive queries."""
    queries = [_unit(step.query) for step in path.steps]
    return [float(one @ other) for one, other in zip(queries, queries[1:], strict=False)]


def same_document(path: Path) -> list[bool]:
    """Whether each step but the first keeps the document of the step before it."""
    return [not step.new_document for step in path.steps[1:]]


def right(guesses: Sequence[Ranking], steps: Sequence[PathStep]) -> list[bool]:
    """Which guesses name the true document."""
    return [int(guess.ids[0]) == step.document for guess, step in zip(guesses, steps, strict=True)]
