"""Reads an index that faiss has written, and sees that it is of the right kind, over the right vectors."""

from pathlib import Path
from typing import Any

from .errors import BadKnowledge


def read_faiss(path: Path, *, flags: int, kinds: tuple[type, ...], maker: str, vectors: tuple[int, int]) -> Any:
    """The index in the file. `vectors` is their number and width, `maker` what writes such files, for the message.

    faiss reads many a damaged file without noticing, so a checksum comes first. `BadKnowledge` naming the file for a
    file that is absent, that faiss cannot read, or that holds no inner-product index of these kinds over as many
    vectors of that width.
    """
    import faiss

    if not path.is_file():
        raise BadKnowledge(f"{path}: there is no such file")
    try:
        index = faiss.read_index(str(path), flags)
    except (RuntimeError, MemoryError) as error:
        raise BadKnowledge(f"{path}: is no index that faiss can read; build it again") from error
    if not isinstance(index, kinds):
        raise BadKnowledge(f"{path}: is no index that {maker} writes")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise BadKnowledge(f"{path}: ranks by another metric than the inner product; build it again")
    if (index.ntotal, index.d) != vectors:
        raise BadKnowledge(
            f"{path}: is of {index.ntotal} vectors of {index.d} numbers; "
            f"these are {vectors[0]} of {vectors[1]}; build it from them"
        )
    return index
