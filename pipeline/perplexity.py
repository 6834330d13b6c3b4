"""One pass over a held-out text: what the model and the neighbours say of the token that follows each position.

What any λ, T and k of KNN-LM make of it (Khandelwal et al. 2020, arXiv 1911.00172) is then arithmetic.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ralmspec.retrievers.base import Query, Retriever
from ralmspec.retrievers.datastore_build import KeyModel, text_tokens
from ralmspec.retrievers.errors import BadKnowledge
from ralmspec.retrievers.folder import Tell
from ralmspec.retrievers.lines import lines
from ralmspec.retrievers.windows import Windows

LEAST = 100  # positions; fewer say nothing
_EACH = 128  # positions evaluated of a window: neighbours in the text say nearly the same, a window is one pass
_BATCH = 128  # queries in a search
_ROWS = 1024  # positions whose neighbours are weighed at once

Floats = NDArray[np.float64]


class TextModel(KeyModel, Protocol):
    """What measuring needs of a language model; `TransformersModel` is one."""

    def evaluate(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.floating[Any]], NDArray[np.float32]]:
        """Logits [b, w, vocabulary] and keys [b, w, key_dimension] after every token of texts [b, w]. Blocking."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """A text as the model reads it: `tokens` int32 [n + 1], and how many `bytes` of UTF-8 they stand for."""

    name: str
    tokens: NDArray[np.int32]
    bytes: int

    @classmethod
    def read(cls, path: Path, model: TextModel) -> "Text":
        """A .txt or .txt.gz, cut into tokens as a datastore's texts are. Raises `BadKnowledge` naming the file if it
        cannot be read or has no more than `LEAST` tokens."""
        if not path.is_file():
            raise BadKnowledge(f"{path}: there is no such file; give a text that is not in the datastore")
        tokens = np.concatenate(list(text_tokens([path], model)))
        if len(tokens) <= LEAST:
            raise BadKnowledge(f"{path}: has {len(tokens)} tokens, which say nothing; give a text of some thousand")
        size = sum(len(line.rstrip(b"\r\n")) + 1 for _, line, _ in lines(path))
        return cls(name=path.name, tokens=tokens, bytes=size)

    @property
    def bytes_per_token(self) -> float:
        """On average."""
        return self.bytes / len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What is known at each of n positions, in the text's order. Takes 5 bytes a position and neighbour.

    `log_p`    float64 [n]: the model's log probability of the token that follows
    `scores`   float32 [n, k]: the neighbours', best first; -inf where the search brought fewer
    `right`    bool [n, k]: whether the neighbour's value is that token
    """

    log_p: Floats
    scores: NDArray[np.float32]
    right: NDArray[np.bool_]

    def p_knn(self, top_k: int, temperature: float) -> Floats:
        """What the `top_k` nearest say of the token that follows: float64 [n]."""
        parts = []
        for first in range(0, len(self.scores), _ROWS):
            scores = self.scores[first : first + _ROWS, :top_k].astype(np.float64)
            weights = np.exp((scores - scores[:, :1]) / temperature)
            right = np.where(self.right[first : first + _ROWS, :top_k], weights, 0.0)
            parts.append(right.sum(axis=1) / weights.sum(axis=1))
        return np.concatenate(parts)

    def mixed(self, top_k: int, interpolation: float, temperature: float) -> Floats:
        """log p of the token that follows under KNN-LM, float64 [n]: `BoundKnnLM.logits` at that token."""
        return mix(interpolation, self.p_knn(top_k, temperature), np.exp(self.log_p))

    def brought(self, top_k: int) -> float:
        """How many of `top_k` neighbours a search brought, on average."""
        return float(np.isfinite(self.scores[:, :top_k]).sum(axis=1).mean())


def gather(
    model: TextModel,
    retriever: Retriever,
    values: NDArray[np.integer[Any]],
    tokens: NDArray[np.integer[Any]],
    windows: Windows,
    *,
    positions: int,
    top_k: int,
    tell: Tell = lambda part, done, total: None,
) -> Evidence:
    """Evaluate `positions` of the text `tokens` (all, if there are fewer; at least `LEAST`), spread over all of it,
    with `top_k` neighbours each.

    `windows` are over `tokens[:-1]`, so that states come about as a datastore's keys do; `values` are the datastore's.
    Windows are read at equal distances, and of those read positions are taken at equal distances. `tell` gets "reading"
    or "searching", and how many positions are done, of how many. Blocking; raises what the model and searches raise.
    """
    if positions < LEAST:
        raise ValueError(f"{positions} tokens say nothing: evaluate at least {LEAST}, better some thousand")
    chosen = list(_spread(windows, positions))
    places = np.concatenate([own for _, own in chosen])
    follows, count = tokens[places + 1], len(places)
    keys, log_p = np.empty((count, model.key_dimension), dtype=np.float32), np.empty(count)
    done = 0
    tell("reading", 0, count)
    for window, own in chosen:  # one at a time: its logits may take some hundred MB
        logits, states = model.evaluate(windows.rows(window, window + 1))
        rows, these = own - windows.begins(window), slice(done, done + len(own))
        log_p[these] = _log_p(windows.owned(logits, window)[rows], follows[these])
        keys[these] = windows.owned(states, window)[rows]
        done += len(own)
        tell("reading", done, count)
    scores = np.full((count, top_k), -np.inf, dtype=np.float32)
    right = np.zeros((count, top_k), dtype=np.bool_)
    tell("searching", 0, count)
    for first in range(0, count, _BATCH):
        queries = [Query(text="", vector=key) for key in keys[first : first + _BATCH]]
        for row, ranking in enumerate(retriever.search(queries, top_k), first):
            scores[row, : len(ranking.scores)] = ranking.scores
            right[row, : len(ranking.ids)] = values[ranking.ids] == follows[row]
        tell("searching", min(first + _BATCH, count), count)
    return Evidence(log_p=log_p, scores=scores, right=right)


def mix(share: float, p_knn: Floats, p_lm: Floats) -> Floats:
    """log p of the mixture; -inf where p is 0."""
    with np.errstate(divide="ignore"):
        log_p: Floats = np.log(share * p_knn + (1 - share) * p_lm)
    return log_p


def perplexity(log_p: Floats) -> float:
    """Per token; infinite where a token has no probability."""
    return math.exp(-float(log_p.mean()))


def bits_per_byte(log_p: Floats, text: Text) -> float:
    """Of UTF-8, with the text's average of bytes a token: comparable between tokenizers."""
    return -float(log_p.mean()) / math.log(2) / text.bytes_per_token


def _spread(windows: Windows, positions: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Windows at equal distances and, of their positions, as many as asked for, at equal distances."""
    positions = min(positions, windows.begins(len(windows)))
    count = min(len(windows), -(-positions // _EACH))
    while True:
        chosen = np.arange(count) * len(windows) // count
        pool = np.concatenate([np.arange(windows.begins(one), windows.begins(one + 1)) for one in chosen.tolist()])
        if len(pool) >= positions:
            break
        count = min(len(windows), 2 * count)
    places = pool[np.arange(positions) * len(pool) // positions]
    for one in chosen.tolist():
        if len(own := places[(places >= windows.begins(one)) & (places < windows.begins(one + 1))]):
            yield one, own


def _log_p(logits: NDArray[np.floating[Any]], tokens: NDArray[np.integer[Any]]) -> Floats:
    """log p of one token for each row of logits."""
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    log_p: Floats = scores[np.arange(len(tokens)), tokens] - np.log(np.exp(scores).sum(axis=1))
    return log_p
