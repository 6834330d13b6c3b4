"""Rows of different lengths, kept one after the other in one array."""

import numpy as np

from .base import Ids


def places(starts: Ids, rows: Ids) -> tuple[Ids, Ids]:
    """Where the entries of these rows stand, in order of the rows, and where each row ends in that sequence.

    `starts` int64 [all rows + 1] says where each row begins, and last where the final one ends; `rows` int64 [n].
    """
    begin = starts[rows]
    sizes = starts[rows + 1] - begin
    ends = sizes.cumsum()
    found = (begin - ends + sizes).repeat(sizes)
    found += np.arange(len(found))
    return ends, found
