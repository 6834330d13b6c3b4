"""Builds an index folder part by part, so that a build that was killed goes on where it was."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import manifest
from .errors import BadKnowledge, MissingExtra
from .index_parts import BuildOptions, Part, parts_of
from .manifest import EncoderFacts, FileFacts, Manifest

Tell = Callable[[str, int, int], None]
"""Progress: the part's name, what is done, and of how much (bytes for "passages" and "checksums", else passages)."""

_PLAN, _LOCK = "plan.json", "lock"
_PACKAGES = ("ralmspec", "numpy", "faiss-cpu", "bm25s", "pyserini", "sentence-transformers", "torch", "transformers")


def build_index(
    source: str | Path,
    folder: str | Path,
    options: BuildOptions,
    *,
    tell: Tell = lambda part, done, total: None,
) -> Manifest:
    """Make `folder` from the passages in `source`: `.jsonl` or `.jsonl.gz`, each with "text", maybe "title" and "id".

    The work goes on in `folder.building`, which becomes `folder` in one rename at the end: what loads is complete.
    Called again with the same arguments after an interruption, it keeps every finished part and goes on inside the
    vectors and the HNSW graph. Texts are streamed, and so are the vectors while they are made; HNSW and IVF hold them
    in memory while they are built, bm25 its postings. Blocking.

    Raises `BadKnowledge` for passages that cannot be served, a folder that exists, an unfinished build with other
    options, or a build that is running there now; `MissingExtra` for a kind whose package is not installed.
    """
    source, folder = Path(source), Path(folder)
    if folder.exists():
        raise BadKnowledge(f"{folder}: exists already; give another folder, or take it away")
    if not source.is_file():
        raise BadKnowledge(f"{source}: there is no such file; give the passages as .jsonl or .jsonl.gz")
    work = folder.with_name(folder.name + ".building")
    work.mkdir(parents=True, exist_ok=True)
    with _alone(work):
        complete = (work / manifest.NAME).exists()  # and only the last move is missing
        if not complete or (work / _PLAN).exists():
            _agree(work, source, options)
        if not complete:
            parts = parts_of(source, options)
            for part in parts:
                if not (work / part.name).exists():
                    _make(part, work, tell)
            _finish(work, [part.name for part in parts], tell)
        made = Manifest.read(work)
        for path in [work / _PLAN, *work.glob("*.facts"), work / _LOCK]:
            path.unlink(missing_ok=True)
        work.rename(folder)
        _sync(folder.parent)
    return made


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """No second build in the same folder; the lock goes with the process, however that ends."""
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        raise MissingExtra("building an index needs: pip install 'ralmspec[local]'") from None
    try:
        with FileLock(work / _LOCK, timeout=0):
            yield
    except Timeout:
        raise BadKnowledge(f"{work}: another build is running there; wait for it") from None


def _agree(work: Path, source: Path, options: BuildOptions) -> None:
    """What an earlier run has left must have been begun with the same passages and options."""
    files = {"source": source} | ({"embeddings": options.embeddings} if options.embeddings is not None else {})
    plan = asdict(options) | {name: FileFacts.of(path, name).sha256 for name, path in files.items()}
    plan = json.loads(json.dumps(plan))
    try:
        begun = json.loads((work / _PLAN).read_text())
    except FileNotFoundError:
        _write(work / _PLAN, plan)
        return
    if other := [name for name in plan if begun.get(name) != plan[name]]:
        raise BadKnowledge(
            f"{work}: holds an unfinished build with other {', '.join(other)}; "
            "go on with the options of that one, or take the folder away"
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
    _write(work / f"{part.name}.facts", facts)
    target.rename(work / part.name)
    _sync(work)


def _finish(work: Path, parts: list[str], tell: Tell) -> None:
    """The manifest, last: with it the folder is complete."""
    facts = {part: json.loads((work / f"{part}.facts").read_text()) for part in parts}
    paths = sorted((part, path) for part in parts for path in (work / part).rglob("*") if path.is_file())
    size, done, files = sum(path.stat().st_size for _, path in paths), 0, {}
    for part, path in paths:
        tell("checksums", done, size)
        files[path.relative_to(work).as_posix()] = made = FileFacts.of(path, part)
        done += made.bytes
    tell("checksums", size, size)
    encoder = facts.get("vectors", {}).pop("encoder", None)
    Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        passages=facts["passages"]["count"],
        encoder=EncoderFacts(**encoder) if encoder else None,
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


def _write(path: Path, content: Any) -> None:
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(content, indent=2))
    _sync(draft)
    draft.replace(path)


def _sync(path: Path) -> None:
    """Make sure that it is on the disk, so that after a power cut too a part that is there is whole."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
