"""Builds examples/demo from a data folder: some dozen real questions, and the few thousand passages to ask them over.

    python examples/build_demo.py --data FOLDER        (or set RALMSPEC_DATA)

The same data folder gives the same files, byte for byte under one zlib: nothing is drawn at random, gzip headers
carry no time, and the passages keep their order, so that neighbours stay neighbours. The model folder is left alone.
"""

import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

PASSAGES = "passages_wikipedia.jsonl.gz"
EMBEDDINGS = "embeddings_wikipedia_minilm_f16.npy"
QUESTIONS = "questions_nq.jsonl.gz"
SEED = "ralmspec demo 1"

# Words that say nothing about what a question is about.
COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been by can come comes could did do does done for from get go got had has have "
        "he her him his how i in into is it its made make makes many me much of off on or out she so some "
        "than that the their them there they this to took up us use used was we were what when where which "
        "while who whom whose why will with would you your",
    )
)

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Find:
    """A question, the article that it names, and how well one passage there that holds an answer covers its words."""

    question: int
    title: str
    coverage: float


def read(path: Path) -> list[Record]:
    """All records of a JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, records: Iterable[Record]) -> None:
    """Records as JSON lines; the gzip header names no file and no time."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))


@cache
def content(text: str) -> frozenset[str]:
    """The content words of a text, cut so that `border` and `borders`, or `nations` and `national`, are one."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("'s", "").replace("'", ""))
    return frozenset(word[:6] if len(word) > 6 else word.removesuffix("s") for word in words if word not in COMMON)


def short(answers: Iterable[str]) -> list[str]:
    """Answers that a passage can be searched for: at most five words, at least four characters."""
    return [answer for answer in answers if len(answer.split()) <= 5 and len(answer) >= 4]


def find(number: int, question: Record, articles: dict[str, list[Record]], titles: dict[str, set[str]]) -> Find | None:
    """The best article for a question, or None.

    Its title (without what stands in brackets) must be named in the question with every content word; an answer that
    neither question nor title gives away must stand verbatim in one of its passages.
    """
    asked = content(question["question"])
    best: Find | None = None
    for title in sorted(set().union(*(titles[word] for word in asked))):
        named = content(re.sub(r"\(.*?\)", "", title))
        if not named <= asked:
            continue
        for answer in short(question["answers"]):
            rest = asked - content(answer)
            if content(answer) <= asked | named or not rest:
                continue
            verbatim = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)")
            for passage in articles[title]:
                if verbatim.search(passage["text"]):
                    coverage = len(rest & content(title + " " + passage["text"])) / len(rest)
                    if best is None or coverage > best.coverage:
                        best = Find(question=number, title=title, coverage=coverage)
    return best


def ask(questions: list[Record], articles: dict[str, list[Record]], count: int) -> list[Find]:
    """The `count` questions that a passage covers best, one an article at most, in file order; it also breaks ties."""
    titles: dict[str, set[str]] = defaultdict(set)
    for title in articles:
        for word in content(re.sub(r"\(.*?\)", "", title)):
            titles[word].add(title)
    finds = (find(number, question, articles, titles) for number, question in enumerate(questions))
    chosen: dict[str, Find] = {}
    for best in sorted((found for found in finds if found), key=lambda found: -found.coverage):
        if len(chosen) < count:
            chosen.setdefault(best.title, best)
    return sorted(chosen.values(), key=lambda found: found.question)


def fill(articles: dict[str, list[Record]], wanted: set[str], count: int) -> list[Record]:
    """The passages of the wanted articles and of whole others, drawn by a hash of the title, up to `count`."""
    held = sum(len(articles[title]) for title in wanted)
    titles = set(wanted)
    for title in sorted(articles, key=lambda title: hashlib.sha256(f"{SEED} {title}".encode()).digest()):
        if title not in titles and held + len(articles[title]) <= count:
            titles.add(title)
            held += len(articles[title])
    return [passage for title, passages in articles.items() if title in titles for passage in passages]


def list_files(folder: Path) -> None:
    """Write the table of files, sizes and sums under the last heading of the folder's README, where it has one."""
    readme = folder / "README.md"
    if not readme.exists():
        return
    rows = ["| file | bytes | sha256 |", "|---|---|---|"]
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != readme):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(f"| {path.relative_to(folder).as_posix()} | {path.stat().st_size:,} | {digest} |")
    head, heading, _ = readme.read_text(encoding="utf-8").partition("## Files\n")
    readme.write_text(head + heading + "\n" + "\n".join(rows) + "\n", encoding="utf-8")


def main(
    data: Annotated[Path, typer.Option(envvar="RALMSPEC_DATA", exists=True, help="Folder with the full data.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path(__file__).parent / "demo",
    questions: Annotated[int, typer.Option(min=1, help="Questions to keep.")] = 48,
    passages: Annotated[int, typer.Option(min=1, help="Passages to keep, about.")] = 6_000,
) -> None:
    """Choose questions and passages, renumber the passages, and take their rows of the embeddings."""
    articles: dict[str, list[Record]] = defaultdict(list)
    for passage in read(data / PASSAGES):
        articles[passage["title"]].append(passage)
    asked = read(data / QUESTIONS)
    finds = ask(asked, articles, questions)
    kept = fill(articles, {found.title for found in finds}, passages)

    out.mkdir(parents=True, exist_ok=True)
    write(out / QUESTIONS, (asked[found.question] for found in finds))
    write(out / PASSAGES, ({**passage, "id": row} for row, passage in enumerate(kept)))
    vectors = np.load(data / EMBEDDINGS, mmap_mode="r")
    np.save(out / EMBEDDINGS, np.ascontiguousarray(vectors[[passage["id"] for passage in kept]]))
    list_files(out)
    print(f"{len(finds)} questions over {len(kept):,} passages of {len({p['title'] for p in kept})} articles in {out}")


if __name__ == "__main__":
    typer.run(main)
