"""Builds a folder part by part, so that a build that was killed goes on where it was: indexes and datastores alike."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import manifest
from .errors import BadKnowledge, MissingExtra
from .manifest import Content, EncoderFacts, FileFacts, Manifest

Progress = Callable[[int, int], None]
"""What is done of a part, and of how much."""

Tell = Callable[[str, int, int], None]
"""Progress with the part's name first; what is counted is in `BYTES` for some parts, for the others documents."""

BYTES = frozenset({"passages", "tokens", "checksums"})
"""Parts whose progress is in bytes."""

_PLAN, _LOCK = "plan.json", "lock"
_PACKAGES = ("ralmspec", "numpy", "faiss-cpu", "bm25s", "pyserini", "sentence-transformers", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Part:
    """`make(folder, target, progress)` writes the part into the folder `target`, reading finished parts in `folder`,
    and returns what the manifest should say of it. One that `resumes` finds in `target` what an earlier run left there.

    Two facts have a meaning of their own: "count", which the first part gives, is the number of documents, and
    "encoder" what made the vectors (the fields of `EncoderFacts`).
    """

    name: str
    make: Callable[[Path, Path, Progress], dict[str, Any]]
    resumes: bool = False


def build_folder(
    folder: Path,
    content: Content,
    sources: Sequence[Path],
    *,
    plan: Callable[[], dict[str, Any]],
    parts: Sequence[Part],
    tell: Tell,
) -> Manifest:
    """Make `folder` of these parts, each after those it needs, from the files `sources`.

    The work goes on in `folder.building`, which becomes `folder` in one rename at the end: what loads is complete.
    Called again after an interruption it keeps every finished part, and goes on inside those that resume. `plan` says
    what the result follows from besides the sources' contents: what an earlier run left must have been begun with the
    same. Blocking.

    Raises `BadKnowledge` for a folder that exists, a source that does not, an unfinished build with another plan, a
    build that is running there now, or one whose work is taken away meanwhile.
    """
    if folder.exists():
        raise BadKnowledge(f"{folder}: exists already; give another folder, or take it away")
    for source in sources:
        if not source.is_file():
            raise BadKnowledge(f"{source}: there is no such file")
    work = folder.with_name(folder.name + ".building")
    work.mkdir(parents=True, exist_ok=True)
    with _alone(work):
        complete = (work / manifest.NAME).exists()  # and only the last move is missing
        if not complete or (work / _PLAN).exists():
            _agree(work, content, {**plan(), "sources": [FileFacts.of(path, path.name).sha256 for path in sources]})
        if not complete:
            for part in parts:
                if not (work / part.name).exists():
                    _make(part, work, tell)
            _finish(work, content, [part.name for part in parts], tell)
        made = Manifest.read(work, content)
        for path in [work / _PLAN, *work.glob("*.facts"), work / _LOCK]:
            path.unlink(missing_ok=True)
        work.rename(folder)
        _sync(folder.parent)
    return made


def write_json(path: Path, content: Any) -> None:
    """In one move, and only once it is on the disk."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(content, indent=2))
    _sync(draft)
    draft.replace(path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; `BadKnowledge` if that is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise BadKnowledge(f"{path}: is damaged; take the unfinished build away and begin anew") from None


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """No second build in the same folder; the lock goes with the process, however that ends."""
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        raise MissingExtra("building needs: pip install 'ralmspec[local]'") from None
    try:
        with FileLock(work / _LOCK, timeout=0):
            yield
    except Timeout:
        raise BadKnowledge(f"{work}: another build is running there; wait for it") from None
    except OSError as error:
        if work.exists():
            raise
        raise BadKnowledge(f"{work}: was taken away while it was being built; build again") from error


def _agree(work: Path, content: Content, plan: dict[str, Any]) -> None:
    """What an earlier run has left must have been begun with the same plan."""
    plan = json.loads(json.dumps({"content": content, **plan}))
    try:
        begun = read_json(work / _PLAN)
    except FileNotFoundError:
        write_json(work / _PLAN, plan)
        return
    if begun.get("content") != content:
        raise BadKnowledge(f"{work}: holds an unfinished {begun.get('content')}; give another folder, or take it away")
    if other := [name for name in plan if begun.get(name) != plan[name]]:
        raise BadKnowledge(
            f"{work}: holds an unfinished build with other {', '.join(other)}; "
            "go on with those of that one, or take the folder away"
        )


def _make(part: Part, work: Path, tell: Tell) -> None:
    """A part is there when its folder is: first the facts, then one rename."""
    target = work / f"{part.name}.part"
    if not part.resumes:
        shutil.rmtree(target, ignore_errors=True)
    target.mkdir(exist_ok=True)
    facts = part.make(work, target, lambda done, total: tell(part.name, done, total))
    for path in target.rglob("*"):
        _sync(path)
    _sync(target)
    write_json(work / f"{part.name}.facts", facts)
    target.rename(work / part.name)
    _sync(work)


def _finish(work: Path, content: Content, parts: list[str], tell: Tell) -> None:
    """The manifest, last: with it the folder is complete."""
    facts = {part: read_json(work / f"{part}.facts") for part in parts}
    paths = sorted((part, path) for part in parts for path in (work / part).rglob("*") if path.is_file())
    size, done, files = sum(path.stat().st_size for _, path in paths), 0, {}
    for part, path in paths:
        tell("checksums", done, size)
        files[path.relative_to(work).as_posix()] = made = FileFacts.of(path, part)
        done += made.bytes
    tell("checksums", size, size)
    encoder = next((made.pop("encoder") for made in facts.values() if "encoder" in made), None)
    Manifest(
        content=content,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        documents=facts[parts[0]]["count"],
        encoder=EncoderFacts(**encoder) if encoder else None,
        metric=manifest.METRICS[content],
        parts=facts,
        versions=dict(_versions()),
        files=files,
    ).save(work)
    _sync(work)


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _sync(path: Path) -> None:
    """Make sure that it is on the disk, so that after a power cut too a part that is there is whole."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
