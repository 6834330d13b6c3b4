"""Prompts from a held-out text: stretches of it, spread evenly."""

from pathlib import Path

from ralmspec.retrievers.errors import BadKnowledge
from ralmspec.retrievers.lines import lines
from ralmspec.stages.model import LanguageModel

_SPARE = 16  # tokens; a stretch cut out of its text may need fewer tokens when it is read alone
_LINES = 20_000


def held_out_prompts(model: LanguageModel, text: Path, *, count: int, tokens: int) -> list[str]:
    """`count` stretches of the text, each at least `tokens` tokens long: cut it on the left to that length.

    `text` is .txt or .txt.gz, a paragraph a line; of a long one the beginning is used. Raises `BadKnowledge` naming
    the file where it cannot be read or is too short.
    """
    if not text.is_file():
        raise BadKnowledge(f"{text}: there is no such file; give a text that is not in the datastore, .txt or .txt.gz")
    pieces = [line.decode(errors="replace") for row, line, _ in lines(text) if row < _LINES]
    read = model.encode("".join(pieces))
    length = tokens + _SPARE
    if len(read) < count * length:
        raise BadKnowledge(
            f"{text}: has {len(read):,} tokens; {count} prompts of {tokens} tokens need {count * length:,}: "
            "give a longer text, or ask for fewer or shorter prompts"
        )
    starts = [(len(read) - length) * number // max(1, count - 1) for number in range(count)]
    return [model.decode(read[start : start + length]) for start in starts]
