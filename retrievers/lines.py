"""Reads a text file line by line, plain or gzipped, in little memory."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from .errors import BadKnowledge


def lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Each line's row, from 0, and its bytes with the line's end; and how many of the file's bytes were read so far.

    Raises `BadKnowledge` naming the file if it cannot be read to its end.
    """
    try:
        with path.open("rb") as raw:
            unpacked = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            for row, line in enumerate(unpacked):
                yield row, line, raw.tell()
    except (OSError, EOFError, zlib.error) as error:
        raise BadKnowledge(f"{path}: cannot be unpacked ({error}); fetch or write the file again") from error
