"""Tokens as text, piece by piece, so that the pieces joined are the whole."""

from collections.abc import Callable, Sequence


class TextStream:
    """What each further stretch of tokens adds to the text so far.

    A token's text may depend on those before it (a leading space, a character spread over several tokens), so every
    piece is rendered together with the piece before it, and what that one gave alone is taken off.
    """

    def __init__(self, render: Callable[[Sequence[int]], str]) -> None:
        self._render = render
        self._before = 0  # where the piece before begins
        self._done = 0  # tokens whose text has been given

    def advance(self, tokens: Sequence[int], *, last: bool) -> str:
        """The text that `tokens`, all so far, add; a character whose bytes are not all there waits, but at the end."""
        text = self._beyond(tokens)
        if text.endswith("\ufffd") and not last:
            return ""
        self._before, self._done = self._done, len(tokens)
        return text

    def newest(self, tokens: Sequence[int]) -> str:
        """What the last of `tokens` adds to those before it, without advancing."""
        before, after = (self._beyond(part).rstrip("\ufffd") for part in (tokens[:-1], tokens))
        return after[len(before) :]

    def _beyond(self, tokens: Sequence[int]) -> str:
        given = self._render(tokens[self._before : self._done])
        return self._render(tokens[self._before :])[len(given) :]
