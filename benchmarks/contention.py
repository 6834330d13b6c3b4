"""What model and index cost each other where they share cores and memory: each alone, and both at once.

    python benchmarks/contention.py
    python benchmarks/contention.py --data DIR --sizes 0,2000000 --scans stored,codes --out contention

One thread works for the model, decoding a token of one session again and again or reading a document of 200 tokens,
another one searches, and nothing else runs: no pipeline, no speculation. What is slower here beside the other is slower
for want of a core or of memory bandwidth, and no scheduling will win it back. Sizes beyond the data's are padded with
distractors.
"""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from ralmspec.pipeline.engine import Engine, EngineOptions, choose_questions, open_engine
from ralmspec.pipeline.reports import environment
from ralmspec.retrievers.base import Query
from ralmspec.stages.model import Prefix, read_to_end

DEMO = Path(__file__).parent.parent / "examples" / "demo"
SESSION = -1  # no served session has a negative number
CONTEXT, DOCUMENT = 200, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """Milliseconds that one piece of work of each takes, alone and while the other never stops."""

    index: str
    queries: int
    work: str
    model_alone: float
    index_alone: float
    model_beside: float
    index_beside: float


def alone(work: Callable[[], object], seconds: float) -> float:
    """Milliseconds that one piece takes, over so many seconds."""
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        work()
        count += 1
    return 1000 * (time.perf_counter() - begun) / count


def beside(one: Callable[[], object], other: Callable[[], object], seconds: float) -> tuple[float, float]:
    """The same of both, each while the other runs: who has had its time goes on until the other has, too."""
    start, timed = threading.Barrier(2), (threading.Event(), threading.Event())

    def repeat(work: Callable[[], object], place: int) -> float:
        start.wait()
        try:
            took = alone(work, seconds)
        finally:
            timed[place].set()
        while not timed[1 - place].is_set():
            work()
        return took

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(repeat, work, place) for place, work in enumerate((one, other))]
        return both[0].result(), both[1].result()


def model_work(engine: Engine) -> dict[str, Callable[[], object]]:
    """Decoding: one more token of a prefix that is known but for it. Reading: a document in front of the context."""
    model = engine.model
    random = np.random.default_rng(0)
    known = random.integers(10, 1000, CONTEXT + DOCUMENT)

    def decode() -> object:
        known[-1] = 10 + (known[-1] + 1) % 50
        return read_to_end(model, Prefix(session=SESSION, tokens=known))

    def read() -> object:
        return read_to_end(model, Prefix(session=SESSION, tokens=random.integers(10, 1000, DOCUMENT)))

    return {"decode a token": decode, f"read {DOCUMENT} tokens": read}


def measured(engine: Engine, queries: list[Query], seconds: float) -> list[Contention]:
    """Every kind of work, beside searches of one and of eight queries."""
    made = []
    for count in (1, 8):
        asked = queries[:count]

        def search(asked: list[Query] = asked) -> object:
            return engine.index.search(asked, 20)

        for name, work in model_work(engine).items():
            for each in (work, search):  # warm
                each()
            model_alone, index_alone = alone(work, seconds), alone(search, seconds)
            model_beside, index_beside = beside(work, search, seconds)
            made.append(
                Contention(
                    index=engine.description,
                    queries=count,
                    work=name,
                    model_alone=model_alone,
                    index_alone=index_alone,
                    model_beside=model_beside,
                    index_beside=index_beside,
                )
            )
    engine.model.forget(SESSION)
    return made


def table(found: list[Contention]) -> list[str]:
    """As Markdown. The last column is what both threads get done, in what one alone would get done: 1 to 2."""
    heads = ["index", "queries", "work of the model", "model alone ms", "search alone ms", "model beside ms"]
    heads += ["search beside ms", "both, in threads of work"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for one in found:
        times = (one.model_alone, one.index_alone, one.model_beside, one.index_beside)
        both = one.model_alone / one.model_beside + one.index_alone / one.index_beside
        told = " | ".join(f"{took:.1f}" for took in times)
        lines.append(f"| {one.index} | {one.queries} | {one.work} | {told} | {both:.2f} |")
    return lines


def main(
    model: Annotated[str, typer.Option(help="Language model: a folder or a hub id.")] = str(DEMO / "model"),
    data: Annotated[Path, typer.Option(help="Folder with passages, embeddings, questions.")] = DEMO,
    sizes: Annotated[str, typer.Option(help="Vectors, with commas; 0 for as many as there are.")] = "0",
    scans: Annotated[str, typer.Option(help="How they are searched, with commas: stored, codes.")] = "stored,codes",
    sets: Annotated[str, typer.Option(help="Question sets for the queries.")] = "nq",
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each measurement.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="Write OUT.md and OUT.json.")] = None,
) -> None:
    """Measure the model alone, the index alone, and both."""
    console, found = Console(width=200), list[Contention]()
    for size in map(int, sizes.split(",")):
        for scan in scans.split(","):
            options: dict[str, Any] = {"model": model, "data": data, "pad_to": size, "scan": scan}
            engine = open_engine(EngineOptions(**options))
            chosen = choose_questions(engine.questions, sets.split(","), 8)
            queries = [Query(text=question.question) for _, question in chosen][:8]
            found += measured(engine, engine.index.encode(queries), seconds)
            console.print("\n".join(table(found[-4:])[2:]), highlight=False, markup=False)
    if out is not None:
        facts = environment()
        head = f"{facts['machine']}, {facts['date']}, {seconds:g} s each, one thread for the model, one for the index. "
        head += f"`{facts['command']}`"
        out.with_suffix(".md").write_text("\n".join([head, "", *table(found)]) + "\n")
        result = {"environment": facts, "found": [asdict(one) for one in found]}
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
