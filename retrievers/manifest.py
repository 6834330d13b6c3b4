"""What an index folder says of itself: how it was made, and the checksum of every file in it."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import BadKnowledge

NAME = "manifest.json"


class FileFacts(BaseModel):
    """One file; `part` is the part of the index that it belongs to, such as "vectors" or "hnsw"."""

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
    """The encoder whose queries the vectors are for; `fingerprint` is a checksum of its weights and settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dimension: int
    fingerprint: str


class Manifest(BaseModel):
    """The contents of `manifest.json`. `parts` holds what each part was made with, `files` is by relative path.

    The file ends with a checksum of itself and is accepted only byte for byte as `save` writes it, so that no damage,
    to it or to a file it names, goes unnoticed. That guards against accidents and mix-ups, not against a forger.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["ralmspec index 1"] = "ralmspec index 1"
    created: str
    passages: int
    encoder: EncoderFacts | None
    metric: Literal["inner product"] = "inner product"
    parts: dict[str, dict[str, Any]]
    versions: dict[str, str]
    files: dict[str, FileFacts]

    @property
    def kinds(self) -> list[str]:
        """The kinds of retriever that the folder can serve."""
        return [*(["exact"] if "vectors" in self.parts else []), *(self.parts.keys() - {"passages", "vectors"})]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises `BadKnowledge` if there is none, or not one that `save` wrote."""
        path = folder / NAME
        try:
            raw = path.read_bytes()
        except OSError as error:
            what = "no index folder" if isinstance(error, FileNotFoundError | NotADirectoryError) else str(error)
            raise BadKnowledge(f"{path}: {what}; make one with `ralmspec index build`") from None
        try:
            manifest = cls.model_validate_json(json.dumps(json.loads(raw)["index"]), strict=True)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise BadKnowledge(f"{path}: is damaged, or of another version ({detail}); build the index again") from None
        if raw != manifest._sealed():
            raise BadKnowledge(f"{path}: its checksum does not fit its contents; build the index again")
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
                    raise BadKnowledge(f"{path}: is missing; build the index again")
                if path.stat().st_size != facts.bytes or FileFacts.of(path, facts.part) != facts:
                    raise BadKnowledge(f"{path}: is not the file that the index was built with; build the index again")
        for path in sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
            if path.relative_to(folder).as_posix() not in self.files:
                raise BadKnowledge(f"{path}: does not belong to the index; take it away")

    def _sealed(self) -> bytes:
        index = self.model_dump(mode="json")
        body = json.dumps(index, sort_keys=True, ensure_ascii=False)
        seal = hashlib.sha256(body.encode()).hexdigest()
        return (json.dumps({"index": index, "sha256": seal}, indent=2, ensure_ascii=False) + "\n").encode()
