"""Reads a prompt: text to tokens, cut on the left where it is too long."""

from .errors import EmptyPrompt, PromptTooLong
from .model import LanguageModel

_CHARACTERS_PER_TOKEN = 64
"""A prompt is cut to this many characters per allowed token before it is tokenised, so that a huge one costs little."""


def read_prompt(model: LanguageModel, text: str, *, limit: int, truncate: bool) -> tuple[list[int], int]:
    """The last `limit` tokens of a prompt, and how many were cut.

    Raises `EmptyPrompt`, and, unless `truncate`, `PromptTooLong` where something would have to be cut.
    """
    if not text.strip():
        raise EmptyPrompt("the prompt is empty: give at least one word to retrieve with")
    characters = limit * _CHARACTERS_PER_TOKEN
    if len(text) > characters and not truncate:
        raise PromptTooLong(f"the prompt has {len(text)} characters, far more than the {limit} tokens allowed")
    dropped = len(text) - characters if len(text) > characters else 0
    tokens = model.encode(text[dropped:])
    cut = max(0, len(tokens) - limit)
    if cut and not truncate:
        raise PromptTooLong(f"the prompt has {len(tokens)} tokens, {limit} are allowed: shorten it or truncate")
    # Characters dropped unseen are counted as the tokens they would have been at the rate of the rest.
    unseen = round(dropped * len(tokens) / (len(text) - dropped)) if dropped else 0
    return tokens[cut:], cut + unseen
