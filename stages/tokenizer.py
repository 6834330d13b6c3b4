"""Text to tokens and back, so that no text can smuggle in a special token."""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any


class PlainTokenizer:
    """A tokenizer for which "</s>" in a document is four characters, never the end of a sequence.

    Works on its own copy of the Rust tokenizer, set once and never changed again, so any thread may use it.
    """

    def __init__(self, backend: Any, special: Iterable[int]) -> None:
        """`backend` is a `tokenizers.Tokenizer`; `special` the ids that text must never produce."""
        description = json.loads(backend.to_str())
        self.special = frozenset(special) | {a["id"] for a in description["added_tokens"] if a["special"]}
        # Some checkpoints forget the mark on a token that they use as special (the end of sequence, say).
        for added in description["added_tokens"]:
            added["special"] = added["id"] in self.special
        self._tokens = type(backend).from_str(json.dumps(description))
        self._tokens.no_truncation()
        self._tokens.no_padding()
        self._tokens.encode_special_tokens = True
        names = [name for id in sorted(self.special) if (name := self._tokens.id_to_token(id))]
        self._special_text = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")

    @property
    def largest_id(self) -> int:
        """The largest id that text can produce; -1 for an empty vocabulary."""
        return max(set(self._tokens.get_vocab(with_added_tokens=True).values()) - self.special, default=-1)

    def start_tokens(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text."""
        plain = self._tokens.encode("a", add_special_tokens=False).ids
        full = self._tokens.encode("a", add_special_tokens=True).ids
        before = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        return tuple(full[:before])

    def encode(self, text: str) -> list[int]:
        """Tokens of the text alone. Lone surrogates, which are no text, are read as question marks."""
        tokens = self._encode(text)
        if self.special.isdisjoint(tokens):
            return tokens
        # The vocabulary itself spells a special token: cut each occurrence after its first character.
        cuts = [0, *(match.start() + 1 for match in self._special_text.finditer(text)), len(text)]
        pieces = [self._encode(text[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        return [token for piece in pieces for token in piece if token not in self.special]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, special ones left out."""
        text: str = self._tokens.decode([int(token) for token in tokens], skip_special_tokens=True)
        return text

    def _encode(self, text: str) -> list[int]:
        try:
            encoding = self._tokens.encode(text, add_special_tokens=False)
        except TypeError:  # raised for a string that has no UTF-8 form
            clean = text.encode("utf-8", "replace").decode("utf-8")
            encoding = self._tokens.encode(clean, add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids


def token_set(*sources: int | Collection[int] | None) -> frozenset[int]:
    """The first of the sources that is given, as a set: configurations write one id, a list of ids, or nothing."""
    for source in sources:
        if source is not None:
            return frozenset([source] if isinstance(source, int) else source)
    return frozenset()
