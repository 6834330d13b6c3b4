"""A JSON Lines file, plain or gzipped, whose records are parsed when they are asked for."""

import gzip
import json
import mmap
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .errors import BadKnowledge

_CHUNK = 1 << 24  # bytes searched for newlines at once, so that a file of any size needs little memory to open


class JsonLines:
    """The records of one file by row, counted from 0; every record is a JSON object on a line of its own.

    The file is opened once. A plain file is mapped into memory, a gzipped one (`.gz`) is kept decompressed. Reading
    is thread-safe. Everything that can be wrong with the file raises `BadKnowledge` naming it, and the line if one is
    to blame; opening looks only for line ends, so a broken line is reported when it is read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._content = self._open()
        self._starts = self._line_starts()

    @classmethod
    def find(cls, folder: Path, stem: str) -> Path:
        """The plain file if it is there (it is mapped, not unpacked), else the gzipped one; else `BadKnowledge`."""
        for path in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz"):
            if path.is_file():
                return path
        raise BadKnowledge(f"{folder}: found neither {stem}.jsonl nor {stem}.jsonl.gz")

    def _open(self) -> bytes | mmap.mmap:
        try:
            if self.path.suffix == ".gz":
                with gzip.open(self.path, "rb") as unpacked:
                    content: bytes | mmap.mmap = unpacked.read()
            else:
                with self.path.open("rb") as file:
                    empty = file.seek(0, 2) == 0  # an empty file cannot be mapped
                    content = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise BadKnowledge(f"{self.path}: there is no such file") from None
        except (OSError, EOFError, zlib.error) as error:
            raise BadKnowledge(f"{self.path}: cannot be read ({error}); fetch or write the file again") from error
        if not content:
            raise BadKnowledge(f"{self.path}: the file is empty; expected one JSON object a line")
        return content

    def _line_starts(self) -> NDArray[np.int64]:
        """Where each line begins, and last where the final one ends: int64 [lines + 1], in bytes."""
        size = len(self._content)
        starts = [np.zeros(1, dtype=np.int64)]
        for offset in range(0, size, _CHUNK):
            chunk = np.frombuffer(self._content, np.uint8, min(_CHUNK, size - offset), offset)
            starts.append(np.flatnonzero(chunk == ord("\n")) + (offset + 1))
        if starts[-1].size == 0 or starts[-1][-1] != size:
            starts.append(np.array([size], dtype=np.int64))  # the last line lacks its newline
        return np.concatenate(starts)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise BadKnowledge(f"{self.path}: there is no row {row}; the file has rows 0 to {len(self) - 1}")
        try:
            record = json.loads(self._content[self._starts[row] : self._starts[row + 1]].decode())
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or the file was closed
            raise self.fault(row, str(error)) from error
        if not isinstance(record, dict):
            raise self.fault(row, f"expected a JSON object, found {type(record).__name__}")
        return record

    def fault(self, row: int, what: str) -> BadKnowledge:
        """The error that says what is wrong with a row."""
        return BadKnowledge(f"{self.path}, line {row + 1}: {what}")

    def text(self, row: int, record: dict[str, Any], key: str) -> str:
        """A field of a row that must hold a string."""
        value = record.get(key)
        if not isinstance(value, str):
            raise self.fault(row, f'"{key}" must be a string, found {"nothing" if value is None else repr(value)}')
        return value

    def close(self) -> None:
        """Lets go of the file; reading afterwards raises `BadKnowledge`. Closing twice is fine."""
        if isinstance(self._content, mmap.mmap):
            self._content.close()
        else:
            self._content = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
