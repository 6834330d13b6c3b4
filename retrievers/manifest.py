"""What a folder that was built says of itself: how it was made, and the checksum of every file in it."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import BadKnowledge
from .vectors import Metric

NAME = "manifest.json"

Content = Literal["index", "datastore"]
"""What a folder holds: passages to search, or the tokens of a text, each with the model's state before it."""

METRICS: dict[Content, Metric] = {"index": "inner product", "datastore": "squared L2"}
_NAMES: dict[Content, tuple[str, str]] = {
    "index": ("an index folder", "ralmspec index"),
    "datastore": ("a datastore of KNN-LM", "ralmspec knn"),
}


class FileFacts(BaseModel):
    """One file; `part` is the part of the folder that it belongs to, such as "vectors" or "hnsw"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, part: str) -> Self:
        """Reads the whole file."""
        with path.open("rb") as file:
            return cls(part=part, bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


class EncoderFacts(BaseModel):
    """What the vectors are compared with the output of: a query encoder or, for a datastore, a language model.
    `fingerprint` is a checksum of its weights and settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dimension: int
    fingerprint: str


class Manifest(BaseModel):
    """The contents of `manifest.json`. `documents` counts what a search can find: passages, or a datastore's entries.
    `parts` holds what each part was made with, `files` is by relative path.

    The file ends with a checksum of itself and is accepted only byte for byte as `save` writes it, so that no damage,
    to it or to a file it names, goes unnoticed. That guards against accidents and mix-ups, not against a forger.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["ralmspec folder 1"] = "ralmspec folder 1"
    content: Content
    created: str
    documents: int
    encoder: EncoderFacts | None
    metric: Metric
    parts: dict[str, dict[str, Any]]
    versions: dict[str, str]
    files: dict[str, FileFacts]

    @property
    def kinds(self) -> list[str]:
        """The kinds of retriever that the folder can serve."""
        exact = ["exact"] if self.parts.keys() & {"vectors", "keys"} else []
        return exact + [part for part in self.parts if part not in ("passages", "vectors", "tokens", "keys")]

    @classmethod
    def read(cls, folder: Path, content: Content = "index") -> Self:
        """Raises `BadKnowledge` if there is none, not one that `save` wrote, or one of a folder that holds another
        content."""
        path, (name, command) = folder / NAME, _NAMES[content]
        try:
            raw = path.read_bytes()
        except OSError as error:
            absent = isinstance(error, FileNotFoundError | NotADirectoryError)
            what = f"no {name.partition(' ')[2]}" if absent else str(error)
            raise BadKnowledge(f"{path}: {what}; make one with `{command} build`") from None
        try:
            manifest = cls.model_validate_json(json.dumps(json.loads(raw)["manifest"]), strict=True)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            again = f"build the {content} again"
            raise BadKnowledge(f"{path}: is damaged, or of another version ({detail}); {again}") from None
        if raw != manifest._sealed():
            raise BadKnowledge(f"{path}: its checksum does not fit its contents; build the {manifest.content} again")
        if manifest.content != content:
            other, its = _NAMES[manifest.content]
            raise BadKnowledge(f"{folder}: is {other}, not {name}; its commands are those of `{its}`")
        return manifest

    def save(self, folder: Path) -> None:
        """Write `manifest.json`, in one move."""
        draft = folder / f"{NAME}.new"
        draft.write_bytes(self._sealed())
        draft.replace(folder / NAME)

    def check(self, folder: Path, parts: Collection[str]) -> None:
        """Read every file of these parts; `BadKnowledge` names the first that is missing, altered or one too many."""
        for name, facts in self.files.items():
            if facts.part in parts:
                path = folder / name
                if not path.is_file():
                    raise BadKnowledge(f"{path}: is missing; build the {self.content} again")
                if path.stat().st_size != facts.bytes or FileFacts.of(path, facts.part) != facts:
                    it = self.content
                    raise BadKnowledge(f"{path}: is not the file that the {it} was built with; build the {it} again")
        for path in sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
            if path.relative_to(folder).as_posix() not in self.files:
                raise BadKnowledge(f"{path}: does not belong to the {self.content}; take it away")

    def _sealed(self) -> bytes:
        contents = self.model_dump(mode="json")
        body = json.dumps(contents, sort_keys=True, ensure_ascii=False)
        seal = hashlib.sha256(body.encode()).hexdigest()
        return (json.dumps({"manifest": contents, "sha256": seal}, indent=2, ensure_ascii=False) + "\n").encode()
