"""What one exact dense search costs, batch by batch: faiss's flat scan, our scan of stored vectors, and of codes.

    python benchmarks/exact_scan.py                 the demo's 6,000 passages
    python benchmarks/exact_scan.py --data DIR --sizes 0,1000000,2000000 --out exact_scan
    python benchmarks/exact_scan.py --data DIR --datastore STORE --neighbours 1024 --out exact_scan

One thread each. The three are timed in turn, round after round, and the quickest round counts, so that other programs
on the machine move the result less. "faiss" is IndexFlatIP.search (IndexFlatL2 for a datastore) over the vectors as
float32, with faiss's own BLAS threshold; it promises neither ties by id nor scores that are the same in every batch.
"stored" and "codes" are `ExactDense` with that `scan`; rankings of the two are compared bit for bit, and a difference
ends the program. Queries are questions of the data folder, or entries of the datastore's second half, a little moved.
Sizes beyond the data's are padded with distractors.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from ralmspec.pipeline.reports import environment
from ralmspec.retrievers.base import Query, Ranking
from ralmspec.retrievers.codes import Codes
from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.datastore import Datastore
from ralmspec.retrievers.dense import ExactDense
from ralmspec.retrievers.encoder import open_encoder
from ralmspec.retrievers.index import SearchOptions
from ralmspec.retrievers.padded import PaddedDense
from ralmspec.retrievers.passages import Passages
from ralmspec.retrievers.questions import QuestionFolder
from ralmspec.retrievers.vectors import Metric, Vectors

DEMO = Path(__file__).parent.parent / "examples" / "demo"
BATCHES = (1, 2, 4, 8, 16, 32)
FAISS_THRESHOLD = 128_000  # queries x dimension at which faiss itself turns to BLAS


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Milliseconds for a batch, by each way."""

    index: str
    k: int
    batch: int
    faiss: float
    stored: float
    codes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """The same vectors, ready for each way; `seconds` and `megabytes` are those of the codes."""

    name: str
    flat: Any
    stored: ExactDense
    codes: ExactDense
    seconds: float
    megabytes: float


def opened(name: str, vectors: Vectors, stored: ExactDense, codes: ExactDense) -> Index:
    """With faiss's index beside the two retrievers, and the codes made once more, to time it."""
    start = time.perf_counter()
    made = Codes.of(vectors)
    seconds = time.perf_counter() - start
    if made is None:
        raise SystemExit(f"{name}: no codes can be made of these vectors")
    wide = Vectors.open(vectors.block(0, len(vectors)), metric=vectors.metric)
    return Index(
        name=name, flat=wide.as_faiss(), stored=stored, codes=codes, seconds=seconds, megabytes=made.nbytes / 1e6
    )


def corpus_index(corpus: Corpus, size: int) -> Index:
    """The data's own vectors, or padded to `size`."""
    encoder, passages = open_encoder("minilm"), Passages(corpus.passages)
    if not size:
        vectors = Vectors.open(corpus.embeddings, memory="float32")
        both = [ExactDense(passages, vectors, encoder, scan=scan) for scan in ("stored", "codes")]
        return opened(f"{len(vectors):,} x {vectors.dimension}", vectors, *both)
    codes = PaddedDense(passages, corpus.embeddings, encoder, pad_to=size)
    stored = _Stored(codes)
    return opened(f"{size:,} x {encoder.dimension} (padded)", codes._vectors, stored, codes)


class _Stored(ExactDense):
    """The same vectors, padding included, without the codes."""

    def __init__(self, padded: ExactDense) -> None:
        super().__init__(padded._passages, padded.rows(np.arange(len(padded))), padded._encoder, scan="stored")
        self._scan_over(padded._vectors, "stored", None)


def measured(index: Index, queries: Sequence[Query], ks: Sequence[int], rounds: int) -> Iterator[Cost]:
    """Every k and batch."""
    import faiss

    vectors = np.stack([query.vector for query in queries if query.vector is not None])
    for k in ks:
        for batch in BATCHES:
            some, few = queries[:batch], np.ascontiguousarray(vectors[:batch])
            ways: list[Callable[[], Any]] = [
                partial(index.flat.search, few, k),
                partial(index.stored.search, some, k),
                partial(index.codes.search, some, k),
            ]
            same(index.stored.search(some, k), index.codes.search(some, k))
            best = [float("inf")] * len(ways)
            ours = faiss.cvar.distance_compute_blas_threshold
            for _ in range(rounds):
                for number, way in enumerate(ways):
                    faiss.omp_set_num_threads(1)
                    faiss.cvar.distance_compute_blas_threshold = ours if number else FAISS_THRESHOLD
                    start = time.perf_counter()
                    way()
                    best[number] = min(best[number], 1000 * (time.perf_counter() - start))
            faiss.cvar.distance_compute_blas_threshold = ours
            yield Cost(index=index.name, k=k, batch=batch, faiss=best[0], stored=best[1], codes=best[2])


def same(some: Sequence[Ranking], others: Sequence[Ranking]) -> None:
    """Ends the program where rankings differ in a bit."""
    for one, other in zip(some, others, strict=True):
        if not np.array_equal(one.ids, other.ids) or one.scores.tobytes() != other.scores.tobytes():
            raise SystemExit(f"rankings differ: {one} and {other}")


def questions(data: Path, count: int) -> list[Query]:
    """Encoded questions of the first set."""
    folder = QuestionFolder(data)
    texts = [question.question for question in folder.read(folder.sets()[0])[:count]]
    vectors: NDArray[np.float32] = open_encoder("minilm").encode(texts)
    return [Query(text=text, vector=vector) for text, vector in zip(texts, vectors, strict=True)]


def states(store: Datastore, count: int) -> list[Query]:
    """Keys from the second half, each moved by a hundredth of its length."""
    random = np.random.default_rng(0)
    keys = store.keys.take(random.integers(len(store) // 2, len(store), count))
    noise = random.standard_normal(keys.shape, dtype=np.float32)
    keys += 0.01 * noise * np.linalg.norm(keys, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    return [Query(text="a state", vector=key) for key in keys]


def table(costs: Sequence[Cost]) -> list[str]:
    """Milliseconds, and the codes' share of faiss's time."""
    lines = [
        "| index | k | batch | faiss flat ms | stored ms | codes ms | codes / faiss |",
        "|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        times = f"{cost.faiss:.1f} | {cost.stored:.1f} | {cost.codes:.1f} | {cost.codes / cost.faiss:.2f}"
        lines.append(f"| {cost.index} | {cost.k} | {cost.batch} | {times} |")
    return lines


def main(
    data: Annotated[
        Path, typer.Option(envvar="RALMSPEC_DATA", help="Folder with passages, embeddings, questions.")
    ] = DEMO,
    sizes: Annotated[str, typer.Option(help="Vectors, by commas; 0 for as many as there are.")] = "0",
    ks: Annotated[str, typer.Option(help="Documents wanted, by commas.")] = "1,20,256",
    datastore: Annotated[Path | None, typer.Option(help="Also a datastore, by distance.")] = None,
    neighbours: Annotated[str, typer.Option(help="Entries wanted of it, by commas.")] = "20,1024",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, of which the quickest counts.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Files for the result, without their .json and .md.")] = None,
) -> None:
    """Measure exact search by three ways."""
    import torch

    torch.set_num_threads(1)
    console, costs, made = Console(), list[Cost](), list[str]()

    def take(index: Index, queries: Sequence[Query], wanted: str) -> None:
        made.append(f"{index.name}: {index.megabytes:,.0f} MB of codes, made in {index.seconds:.1f} s")
        console.print(made[-1], highlight=False)
        for cost in measured(index, queries, [int(k) for k in wanted.split(",")], rounds):
            costs.append(cost)
            console.print(table([cost])[-1], highlight=False)

    asked = questions(data, max(BATCHES))
    for size in sizes.split(",") if sizes else ():
        take(corpus_index(Corpus.find(data, "wikipedia"), int(size)), asked, ks)
    if datastore is not None:
        store = Datastore.open(datastore)
        ways = [store.retriever("exact", SearchOptions(scan=scan)) for scan in ("stored", "codes")]
        stored, codes = (way for way in ways if isinstance(way, ExactDense))
        metric: Metric = store.keys.metric
        name = f"{len(store):,} x {store.dimension} {store.keys.kind}, {metric}"
        take(opened(name, store.keys, stored, codes), states(store, max(BATCHES)), neighbours)
    facts = environment()
    if out is not None:
        head = f"{facts['machine']}, {facts['date']}, one thread, the quickest of {rounds} rounds. `{facts['command']}`"
        out.with_suffix(".md").write_text(
            "\n".join([head, "", *(f"- {line}" for line in made), "", *table(costs)]) + "\n"
        )
        result = {"environment": facts, "codes": made, "costs": [asdict(cost) for cost in costs]}
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
