"""KNN-LM: the next token's distribution is interpolated with that of the nearest stored contexts, at every token.

Source: Khandelwal et al., Generalization through Memorization: Nearest Neighbor Language Models, ICLR 2020, arXiv
1911.00172; served with speculation as in the paper, section 2. p = λ·p_knn + (1 − λ)·p_lm, where p_knn of a token is
proportional to the sum of exp(−d / T) over those of the k nearest entries that hold it, d being the squared distance
between the entry's key and the model's hidden state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ralmspec.retrievers.base import Ids, Query, Ranking, Retriever

from .errors import BadModel
from .messages import Check, Source
from .model import Frontier, LanguageModel, TellsStates, Tokens
from .prompt import read_prompt
from .sampling import Logits


class Entries(Protocol):
    """What this workload needs of a datastore; `retrievers.datastore.Datastore` is one."""

    @property
    def values(self) -> NDArray[np.integer[Any]]:
        """The token of each entry, [n]; entries stand in the order of the text they were made from."""
        ...

    @property
    def dimension(self) -> int:
        """Width of a key."""
        ...

    @property
    def fingerprint(self) -> str:
        """That of the model that made the keys."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnLM:
    """Settings of KNN-LM over a datastore; the pipeline's retriever must search that one's keys by squared distance.

    `top_k` neighbours (the paper: 1 to 1024), `interpolation` λ in [0, 1], `temperature` T; `ralmspec knn tune` finds
    the two for a model and a datastore. `successors` entries that follow a neighbour in the text go into the session's
    cache with it, since the next token's neighbours are mostly there (the paper: 10).
    """

    datastore: Entries
    top_k: int = 64
    interpolation: float = 0.25
    temperature: float = 10.0
    successors: int = 10
    max_prompt_tokens: int = 512
    truncate: bool = True

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("successors", 0), ("max_prompt_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"KnnLM({name}={getattr(self, name)}): must be at least {least}")
        if not 0 <= self.interpolation <= 1:
            raise ValueError(f"KnnLM(interpolation={self.interpolation}): must lie between 0 and 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"KnnLM(temperature={self.temperature}): must be a positive number")

    def bind(self, model: LanguageModel, retriever: Retriever) -> "BoundKnnLM":
        """These settings on a model and a retriever over the datastore.

        Raises `ValueError` for a retriever over something else, and `BadModel` for a model that does not tell its
        hidden states or is not the one that made the keys.
        """
        if len(retriever) != len(self.datastore.values):
            raise ValueError(
                f"the retriever searches {len(retriever):,} entries, the datastore holds "
                f"{len(self.datastore.values):,}: use the datastore's own retriever"
            )
        if not isinstance(model, TellsStates):
            raise BadModel("KNN-LM needs a model that tells its hidden states (TellsStates), as TransformersModel does")
        if model.key_dimension != self.datastore.dimension or model.fingerprint() != self.datastore.fingerprint:
            raise BadModel(
                "the datastore's keys were made by another model: serve it with the one that made it, "
                "or build the datastore anew"
            )
        return BoundKnnLM(self, model)


class BoundKnnLM:
    """KNN-LM on one model and one datastore."""

    retrieval_stride = 1
    asks_with_frontier = True

    def __init__(self, settings: KnnLM, model: LanguageModel) -> None:
        self.settings = settings
        self.top_k = settings.top_k
        self._model = model
        self._values = settings.datastore.values
        self._offsets = np.arange(settings.successors + 1, dtype=np.int64)

    def prompt(self, text: str) -> tuple[list[int], int]:
        """Tokens of the prompt, cut on the left to `max_prompt_tokens`, and how many were cut."""
        settings = self.settings
        return read_prompt(self._model, text, limit=settings.max_prompt_tokens, truncate=settings.truncate)

    def room(self) -> int:
        """Longest prefix before the first generated token."""
        return len(self._model.start_tokens) + self.settings.max_prompt_tokens

    def query(self, context: Sequence[int], frontier: Frontier | None) -> Query:
        """The hidden state."""
        if frontier is None or frontier.key is None:
            raise BadModel("the model brought no hidden state with its logits, which is what KNN-LM retrieves with")
        return Query(text="", vector=frontier.key)

    def prefix(self, context: Sequence[int], retrieved: Ranking | None) -> Tokens:
        """The context, whatever was retrieved."""
        return np.asarray([*self._model.start_tokens, *context], dtype=np.int64)

    def logits(self, frontier: Frontier, retrieved: Ranking) -> Logits:
        """log p of the interpolated distribution, float64 [vocabulary]; -inf where p is 0."""
        scores = retrieved.scores.astype(np.float64) / self.settings.temperature
        neighbours = np.bincount(self._values[retrieved.ids], weights=_softmax(scores), minlength=len(frontier.logits))
        share = self.settings.interpolation
        with np.errstate(divide="ignore"):
            mixed: Logits = np.log(share * neighbours + (1 - share) * _softmax(frontier.logits.astype(np.float64)))
        return mixed

    def agree(self, check: Check, truth: Ranking) -> bool:
        """Same token (paper, section 2): the neighbours themselves need not be the same."""
        assert check.frontier is not None and check.guess is not None
        pick, position = check.request.sampling.pick, check.position
        guessed, true = (self.logits(check.frontier, retrieved) for retrieved in (check.guess, truth))
        return pick(guessed, position) == pick(true, position)

    def around(self, ids: Ids) -> Ids:
        """Each neighbour and the entries that follow it, those of the nearest first."""
        following = (ids[:, np.newaxis] + self._offsets).ravel()
        return following[following < len(self._values)]

    def source(self, retrieved: Ranking) -> Source:
        """The nearest entry; the retriever's `document` tells the text around it."""
        id = int(retrieved.ids[0])
        return Source(id, f"entry {id:,}", float(retrieved.scores[0]))

    def tokens_cut(self, retrieved: Ranking) -> int:
        """None: entries do not stand in the prefix."""
        return 0


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares
