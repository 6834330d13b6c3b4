"""What one question's path says of locality: counts and sums, by the name of the figure they belong to."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from ralmspec.retrievers.base import Ranking, bound_of
from ralmspec.retrievers.ranking import rank

from .locality import Path, Walker
from .locality_drafts import DraftIndex, build
from .locality_guesses import Cached, Drafts, certified, drift, in_strides, right, same_document

WIDE = 1024
"""Documents of a wide search: enough for the largest prefetch and the deepest certificate."""
PREFETCHES = (1, 20, 256, 1000)
CERTIFICATES = (20, 256, 1024)
DRAFTED = (20, 256)
"""Prefetches at whose misses the guessed document's tokens are compared with the true ones."""
STRIDE = 3
RESCORED = 20
"""Documents that a draft index is asked for."""

Name = tuple[str, str]
"""Group and name of a figure; the groups are those of `locality_report`."""


@dataclass(slots=True)
class Counts:
    """Of one question: for every figure a sum and the number of things summed, whose ratio is the figure."""

    question_set: str
    sums: dict[Name, tuple[float, int]] = field(default_factory=lambda: defaultdict(lambda: (0.0, 0)))
    passes: dict[Name, list[float]] = field(default_factory=dict)
    """The values themselves, of figures of time: others on the machine only ever add to those."""

    def add(self, group: str, name: str, values: Iterable[float]) -> None:
        """More values of a figure; none leave it known, with nothing summed."""
        total, number = self.sums[group, name]
        listed = list(values)
        self.sums[group, name] = total + sum(listed), number + len(listed)
        if group == "passes":
            self.passes.setdefault((group, name), []).extend(listed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruments:
    """What is the same for all questions: the walker, and where the retriever is dense draft indexes over its
    vectors."""

    walker: Walker
    drafts: Sequence[DraftIndex] = ()

    def measure(self, question_set: str, question: str) -> Counts:
        """Walk one question's path and count. Blocking, several times as long as serving it."""
        counts = Counts(question_set)
        path = self.walker.walk(question)
        _times(counts, path)
        try:
            self._guesses(counts, path)
        finally:
            self.walker.forget_drafts()
        if path.steps[0].query.vector is not None:
            counts.add("queries", "cosine of consecutive queries", drift(path))
        return counts

    def _guesses(self, counts: Counts, path: Path) -> None:
        retriever, capacity = self.walker.engine.index, self.walker.engine.limits.cached_documents
        steps, drafts = path.steps[1:], Drafts(self.walker, path)
        counts.add("guesses", "document of the step before", same_document(path))
        made = {prefetch: Cached(prefetch=prefetch).guesses(path, retriever, capacity) for prefetch in PREFETCHES}
        for prefetch, guesses in made.items():
            counts.add("guesses", f"cache {prefetch}", right(guesses, steps))
        for prefetch in PREFETCHES[:-1]:
            beside = Cached(prefetch=prefetch, neighbours=True).guesses(path, retriever, capacity)
            counts.add("guesses", f"cache {prefetch} + neighbours", right(beside, steps))
        for wrong_paths, addition in ((False, ""), (True, " + wrong-path results")):
            judged = in_strides(path, drafts, Cached(prefetch=20), capacity, stride=STRIDE, wrong_paths=wrong_paths)
            counts.add("guesses", f"cache 20 in strides of {STRIDE}{addition}", judged)
        for draft in self.drafts:
            self._drafted(counts, path, draft, made[20])
        for prefetch in DRAFTED:
            _surviving(counts, drafts, prefetch, made[prefetch])
        if bound_of(retriever) is not None:
            certain = certified(path, retriever, CERTIFICATES)
            for width in CERTIFICATES:
                counts.add("certificates", f"K = {width}", [width in sure for sure in certain])

    def _drafted(self, counts: Counts, path: Path, draft: DraftIndex, cached: Sequence[Ranking]) -> None:
        """The draft index alone, with its candidates in the true order, and beside the cache."""
        retriever, taken = self.walker.engine.index, list[float]()
        alone, ordered, both = list[bool](), list[bool](), list[bool]()
        for step, guess in zip(path.steps[1:], cached, strict=True):
            assert step.query.vector is not None, "draft indexes are for dense retrievers"
            found, seconds = draft.search(step.query.vector, RESCORED)
            rows = retriever.rows(found)
            best = rank(found, retriever.score(step.query, rows), 1)
            better = max((best, guess), key=lambda one: (one.scores[0], -one.ids[0]))
            alone.append(bool(len(found)) and int(found[0]) == step.document)
            ordered.append(bool(len(found)) and int(best.ids[0]) == step.document)
            both.append(int(better.ids[0]) == step.document)
            taken.append(1e3 * seconds)
        counts.add("guesses", draft.name, alone)
        if draft.rounds:
            counts.add("guesses", f"{draft.name}, its first {RESCORED} scored again", ordered)
        counts.add("guesses", f"cache 20 or {draft.name}", both)
        counts.add("passes", f"{draft.name}, search for {RESCORED}", taken)


def _surviving(counts: Counts, drafts: Drafts, prefetch: int, guesses: Sequence[Ranking]) -> None:
    """At the misses of a cache: what is left of the drafted step under the true document."""
    judged = right(guesses, drafts.path.steps[1:])
    missed = [number for number, hit in enumerate(judged, start=1) if not hit]
    lengths = {number: drafts.surviving(number, guesses[number - 1]) for number in missed}
    whole = {number: kept == len(drafts.path.steps[number].tokens) for number, kept in lengths.items()}
    counts.add("survival", f"p4: all tokens of a wrong guess are right, prefetch {prefetch}", whole.values())
    counts.add("survival", f"right tokens before the first wrong one, prefetch {prefetch}", lengths.values())
    accepted = [hit or whole[number] for number, hit in enumerate(judged, start=1)]
    counts.add("survival", f"γ + (1 − γ)·p4, prefetch {prefetch}", accepted)


def _times(counts: Counts, path: Path) -> None:
    """Milliseconds of the parts of a step. What is read of a new document counts as prefill."""
    steps = path.steps
    new, kept = ([step for step in steps if step.new_document is changed] for changed in (True, False))
    for name, seconds in (
        ("encode the query", [step.encode_s for step in steps]),
        ("search for the document", [step.search_s for step in steps]),
    ):
        counts.add("times", name, [1e3 * taken for taken in seconds])
        counts.add("passes", name, [1e3 * taken for taken in seconds])
    counts.add("times", "prefill", [1e3 * step.first_pass_s * step.new_document for step in steps])
    decoding = [step.decode_s + step.first_pass_s * (not step.new_document) for step in steps]
    counts.add("times", "decode", [1e3 * seconds for seconds in decoding])
    counts.add("passes", "first token under a new document", [1e3 * step.first_pass_s for step in new])
    counts.add("passes", "first token under the same document", [1e3 * step.first_pass_s for step in kept])
    later = [1e3 * step.decode_s / (len(step.tokens) - 1) for step in steps if len(step.tokens) > 1]
    counts.add("passes", "each later token", later)
    counts.add("queries", "steps with a new document", [step.new_document for step in steps[1:]])
    counts.add("queries", "documents in a wide search", [len(step.wide.ids) for step in steps])


def instruments(walker: Walker, kinds: Sequence[str]) -> Instruments:
    """For this walker, with draft indexes of these kinds where the retriever is dense. Blocking: builds them."""
    engine, threads = walker.engine, walker.engine.options.threads.index
    if walker.ask(walker.workload.prompt("a question")[0]).vector is None:
        return Instruments(walker=walker)
    drafts = [build(kind, engine.index, threads=threads) for kind in kinds]
    return Instruments(walker=walker, drafts=drafts)


def in_turns(questions: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Questions of several sets, given set by set, so that the sets take turns: an early end is fair to all."""
    sets = dict.fromkeys(name for name, _ in questions)
    queues = [[question for question in questions if question[0] == name] for name in sets]
    return [question for turn in zip_longest(*queues) for question in turn if question is not None]
