"""Cuts a long text into overlapping windows, so that a model of limited length gives a state after every token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Windows:
    """Windows of `window` tokens over `tokens`, a new one every `window - context`; `context` is a quarter of
    the window unless it is given.

    What a model says after a token is taken from the first window in which at least `context` tokens stand before it;
    at the text's beginning, where there are no such windows, from the first. So each position belongs to one window,
    and those of a window to one run: `begins(i)` to `begins(i + 1)`.

    Each window begins with the tokens in `start`, which count as part of it: those that the model expects at the
    beginning of any text. The last window is filled up with zeros, which no position before them can see.

    Raises `ValueError` for windows that would not move on.
    """

    def __init__(
        self, tokens: NDArray[np.integer[Any]], *, window: int, context: int | None = None, start: Sequence[int] = ()
    ) -> None:
        context = window // 4 if context is None else context
        self._tokens, self._start, self._context = tokens, np.array(start, dtype=np.int64), context
        self._own = window - len(start)
        self._stride = self._own - context
        if context < 0 or self._stride < 1:
            begun = f", {len(start)} of them the model's own," if start else ""
            raise ValueError(
                f"a window of {window} tokens{begun} cannot keep {context} of them as context and still move on; "
                "make the window longer, or the context shorter"
            )

    def __len__(self) -> int:
        """How many windows there are."""
        return 1 + max(0, -(-(len(self._tokens) - self._own) // self._stride))

    @property
    def facts(self) -> dict[str, int]:
        """How the text was cut."""
        return {"window": self._own + len(self._start), "context": self._context}

    def begins(self, window: int) -> int:
        """The first position that belongs to this window; the number of tokens for the one after the last."""
        return min(len(self._tokens), window * self._stride + self._context) if window else 0

    def rows(self, first: int, stop: int) -> NDArray[np.int64]:
        """The tokens of windows `first` to `stop`, int64 [stop - first, width], width the same for every window."""
        width = min(self._own, len(self._tokens))
        rows = np.zeros((stop - first, len(self._start) + width), dtype=np.int64)
        rows[:, : len(self._start)] = self._start
        for row, window in zip(rows, range(first, stop), strict=True):
            own = self._tokens[window * self._stride : window * self._stride + width]
            row[len(self._start) : len(self._start) + len(own)] = own
        return rows

    def owned(self, made: NDArray[Any], first: int) -> NDArray[Any]:
        """Of what a model made of `rows(first, ...)`, [windows, width, ...], that of the positions which belong to
        these windows, in the order of the text: [begins(first + windows) - begins(first), ...]."""
        pieces = []
        for window, states in enumerate(made, first):
            offset = len(self._start) - window * self._stride
            pieces.append(states[self.begins(window) + offset : self.begins(window + 1) + offset])
        return np.concatenate(pieces)
