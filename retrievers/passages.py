"""The texts of a knowledge base, by document id."""

import operator
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, SupportsIndex

from .base import Document
from .jsonl import JsonLines


class Passages:
    """A JSON Lines file of `{"id", "title", "text"}` (plain or `.gz`), where a passage's id is its row, from 0.

    Only line offsets are held for a plain file; a passage is parsed each time it is asked for. Reading is thread-safe.
    A file that cannot be served raises `BadKnowledge` naming file and line: when opened, if it is missing, empty or
    badly compressed; when read, if the passage is no such object, its id is not its row, or there is no such passage.
    """

    def __init__(self, path: str | Path) -> None:
        self._lines = JsonLines(path)

    @property
    def path(self) -> Path:
        """The file."""
        return self._lines.path

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, id: SupportsIndex) -> Document:
        row = operator.index(id)
        record = self._lines[row]
        if record.get("id") != row:
            raise self._lines.fault(row, f'"id" must be {row}, the row, found {record.get("id")!r}')
        return Document(row, self._lines.text(row, record, "title"), self._lines.text(row, record, "text"))

    def __iter__(self) -> Iterator[Document]:
        return (self[row] for row in range(len(self)))

    def close(self) -> None:
        """Lets go of the file; reading afterwards raises `BadKnowledge`. Closing twice is fine."""
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
