"""Tokens as text, piece by piece, so that the pieces joined are the whole."""

from collections.abc import Callable, Sequence


class TextStream:
    """What each further stretch of tokens adds to the text so far.

    Tokens are always rendered from the first one: a token's text may depend on those before it (a leading space, a
    character spread over several tokens). An answer is short, so rendering it anew at every step costs little.
    """

    def __init__(self, render: Callable[[Sequence[int]], str]) -> None:
        self._render = render
        self._text = ""

    def advance(self, tokens: Sequence[int], *, last: bool) -> str:
        """The new part of the text of `tokens`; a character whose bytes are not all there waits, except at the end."""
        text = self._whole(tokens, last=last)
        new, self._text = text[len(self._text) :], text
        return new

    def peek(self, tokens: Sequence[int]) -> str:
        """What the last of `tokens` adds to those before it, without advancing."""
        return self._whole(tokens, last=False)[len(self._whole(tokens[:-1], last=False)) :]

    def _whole(self, tokens: Sequence[int], *, last: bool) -> str:
        text = self._render(tokens)
        return text if last else text.rstrip("\ufffd")
