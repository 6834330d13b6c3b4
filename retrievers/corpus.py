"""Passages and their embeddings in a data folder, found by their names: what `--data DIR` means."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .errors import BadKnowledge
from .jsonl import JsonLines


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of one knowledge base that is served as it lies there.

    passages_<name>.jsonl[.gz]      the texts, see `Passages`
    embeddings_<name>_<model>.npy   their vectors, one row a passage, see `ExactDense`
    """

    passages: Path
    embeddings: Path

    @classmethod
    def find(cls, folder: str | Path, name: str = "wikipedia") -> Self:
        """Finds the files by name; raises `BadKnowledge` saying where it looked and for what."""
        folder = Path(folder)
        if not folder.is_dir():
            raise BadKnowledge(f"{folder}: there is no such folder; give the one that holds passages_{name}.jsonl[.gz]")
        found = sorted(folder.glob(f"embeddings_{name}_*.npy"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found)
            raise BadKnowledge(
                f"{folder}: looked for one file embeddings_{name}_*.npy, found {names or 'none'}; "
                "passages without vectors are served from an index (`ralmspec index build`)"
            )
        return cls(JsonLines.find(folder, f"passages_{name}"), found[0])
