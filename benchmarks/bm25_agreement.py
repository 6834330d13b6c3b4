"""How far the two BM25 retrievers of one index agree: bm25s, in Python, and Lucene.

    python benchmarks/bm25_agreement.py             indexes the demo's 6,000 passages first
    python benchmarks/bm25_agreement.py --index DIR --data DIR --out agreement.json

Lucene rounds the lengths of passages to a byte, and words are cut by two programs, so their rankings differ a little.
Compared over real questions, and over pieces of passages as in-context RaLM asks them. DIR: `--kinds bm25,lucene`.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ralmspec.pipeline.batch_cost import real_queries
from ralmspec.pipeline.reports import environment
from ralmspec.retrievers.base import Query, Retriever
from ralmspec.retrievers.index import open_index
from ralmspec.retrievers.index_build import build_index
from ralmspec.retrievers.index_parts import BuildOptions
from ralmspec.retrievers.questions import QuestionFolder

DEMO = Path(__file__).parent.parent / "examples" / "demo"
K = 10


@dataclass(frozen=True, slots=True)
class Agreement:
    """`same_first` of so many `queries` have the same first document. `overlap` is the mean share of the ten best
    documents that both name, `smallest_overlap` the least."""

    what: str
    queries: int
    same_first: int
    overlap: float
    smallest_overlap: float


def agreement(what: str, one: Retriever, other: Retriever, queries: Sequence[Query]) -> Agreement:
    """Both encode the queries' text for themselves, and search."""
    pairs = [*zip(_best(one, queries), _best(other, queries), strict=True)]
    shares = [len({*left} & {*right}) / len(left) for left, right in pairs]
    same_first = sum(left[0] == right[0] for left, right in pairs)
    return Agreement(what, len(pairs), same_first, sum(shares) / len(pairs), min(shares))


def _best(retriever: Retriever, queries: Sequence[Query]) -> list[list[int]]:
    encoded = retriever.encode([Query(text=query.text) for query in queries])
    return [ranking.ids.tolist() for ranking in retriever.search(encoded, K)]


def main(
    index: Annotated[Path | None, typer.Option(help="Index folder, built with --kinds bm25,lucene.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with questions_SET.jsonl[.gz].")] = DEMO,
    sets: Annotated[str, typer.Option(help="Question sets, with commas.")] = "nq",
    count: Annotated[int, typer.Option(min=1, help="Questions from each set, and pieces of passages.")] = 200,
    out: Annotated[Path | None, typer.Option(help="File for the figures, in JSON.")] = None,
) -> None:
    """Compare the rankings of bm25s and Lucene."""
    with ExitStack() as kept:
        if index is None:
            index = Path(kept.enter_context(tempfile.TemporaryDirectory()), "index")
            build_index(DEMO / "passages_wikipedia.jsonl.gz", index, BuildOptions(kinds=("bm25", "lucene")))
        bm25, lucene = (open_index(index, kind) for kind in ("bm25", "lucene"))
        rows = [agreement(what, bm25, lucene, queries) for what, queries in _queries(bm25, data, sets, count)]
    table = Table("queries", "number", "same first", "overlap of ten", "smallest overlap", box=None)
    for row in rows:
        table.add_row(
            row.what, str(row.queries), str(row.same_first), f"{row.overlap:.3f}", f"{row.smallest_overlap:.1f}"
        )
    Console().print(table)
    if out is not None:
        facts = environment(retrievers=[bm25.description, lucene.description])
        out.write_text(json.dumps({"environment": facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def _queries(retriever: Retriever, data: Path, sets: str, count: int) -> Iterator[tuple[str, list[Query]]]:
    folder = QuestionFolder(data)
    for name in sets.split(","):
        yield f"questions, {name}", [Query(text=question.question) for question in folder.read(name)[:count]]
    yield "pieces of passages", real_queries(retriever, count)


if __name__ == "__main__":
    typer.run(main)
