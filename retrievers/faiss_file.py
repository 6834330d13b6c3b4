"""Reads an index that faiss has written, and sees that it is of the right kind, over the right vectors."""

from pathlib import Path
from typing import Any

from .errors import BadKnowledge
from .vectors import Vectors


def read_faiss(path: Path, *, flags: int, kinds: tuple[type, ...], maker: str, vectors: Vectors) -> Any:
    """The index in the file, over these vectors. `maker` is what writes such files, for the message.

    faiss reads many a damaged file without noticing, so a checksum comes first. `BadKnowledge` naming the file for a
    file that is absent, that faiss cannot read, or that holds no index of these kinds, by the vectors' metric, over as
    many vectors of their width.
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
    if index.metric_type != vectors.faiss_metric:
        raise BadKnowledge(f"{path}: ranks by another metric than the {vectors.metric} of its vectors; build it again")
    if (index.ntotal, index.d) != (len(vectors), vectors.dimension):
        raise BadKnowledge(
            f"{path}: is of {index.ntotal} vectors of {index.d} numbers; "
            f"these are {len(vectors)} of {vectors.dimension}; build it from them"
        )
    return index
