"""A simulated model and knowledge base: real sessions and threads, answers that are drawn, latencies that are slept."""

import random
import time
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from ralmspec.retrievers.base import Document, Ids, Query, Ranking, Scores
from ralmspec.retrievers.ranking import rank
from ralmspec.stages.in_context import InContext
from ralmspec.stages.messages import Committed, Source
from ralmspec.stages.model import Frontier, Prefix, Tokens, token_by_token
from ralmspec.stages.sampling import Sampling
from ralmspec.stages.statistics import Statistics
from ralmspec.stages.workload import Workload

from .engine import Engine, ServingOptions
from .stream import Answer

VOCABULARY = 1024
DOCUMENTS = 1000
_MEMORY = 3  # tokens
_DIMENSION = 24
_NEWEST = 4  # words of a query, which count three times
_WORDS = 64  # of a document


class SimulatedModel:
    """Satisfies `LanguageModel`. The next token is a draw from the first token of the prefix and its last three.

    The first token is the document's own number, so every token tells under which document it was written: a token
    committed under a wrong one is wrong, but for one in a thousand. Text is numbers with spaces between them; 0 ends a
    sequence. A pass sleeps `pass_s`, and `session_s` for every session after the first. It holds no KV memory.
    """

    context_length = 1 << 20
    kv_tokens = 1 << 40
    end_tokens = frozenset({0})
    start_tokens: tuple[int, ...] = ()

    def __init__(self, *, batch: int = 16, pass_s: float = 0.0, session_s: float = 0.0) -> None:
        self.max_batch = batch
        self.pass_s = pass_s
        self.session_s = session_s
        self._frontiers = [Frontier(row) for row in np.eye(VOCABULARY, dtype=np.float32)]

    @property
    def description(self) -> str:
        """What a report calls this model."""
        return f"simulated; {self.pass_s:g} s a pass of one session, {self.session_s:g} s for each further one"

    def encode(self, text: str) -> list[int]:
        """The numbers in the text."""
        return [int(word) % VOCABULARY for word in text.split() if word.isdecimal()]

    def decode(self, tokens: Sequence[int]) -> str:
        """The numbers as text."""
        return " ".join(map(str, tokens))

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        """What comes next, for certain."""
        _sleep(self.pass_s + self.session_s * (len(prefixes) - 1))
        return [token_by_token(prefix, self._frontier) for prefix in prefixes]

    def forget(self, session: int) -> None:
        """Nothing is kept."""

    def _frontier(self, tokens: Tokens) -> Frontier:
        return self._frontiers[_next(tokens)]


class SimulatedRetriever:
    """Satisfies `Retriever`: exact search in a thousand vectors of ones and minus ones, so sums are exact too.

    A query's vector adds up its words, the newest with more weight; 28 of 32 words are those of the query before. So
    documents come again, and a cache guesses right about as often as in real text: two times of three.
    A search sleeps `call_s`, and `query_s` for every query in it.
    """

    def __init__(self, *, call_s: float = 0.0, query_s: float = 0.0, concurrency: int = 1) -> None:
        self.call_s = call_s
        self.query_s = query_s
        self.concurrency = concurrency
        self._vectors = np.random.default_rng(0).choice((-1, 1), (DOCUMENTS, _DIMENSION)).astype(np.float32)
        self._ids = np.arange(DOCUMENTS, dtype=np.int64)
        self.document = lru_cache(maxsize=None)(_document)

    @property
    def description(self) -> str:
        """What a report calls this retriever."""
        return (
            f"simulated, {DOCUMENTS:,} documents; {self.call_s:g} s a search and {self.query_s:g} s a query, "
            f"{self.concurrency} at once"
        )

    def __len__(self) -> int:
        return DOCUMENTS

    def encode(self, queries: Sequence[Query]) -> list[Query]:
        """With the sums of their words."""
        return [Query(text=query.text, vector=_sum(query.text)) for query in queries]

    def search(self, queries: Sequence[Query], k: int) -> list[Ranking]:
        """The k best documents of each."""
        _sleep(self.call_s + self.query_s * len(queries))
        return [rank(self._ids, self.score(query, self._vectors), k) for query in queries]

    def rows(self, ids: Ids) -> Scores:
        """Their vectors."""
        return self._vectors[ids]

    def score(self, query: Query, rows: Scores) -> Scores:
        """Inner products."""
        assert query.vector is not None, "a query is encoded before it is scored"
        return rows @ query.vector


def direct_answer(prompt: str, workload: Workload, *, max_new_tokens: int, sampling: Sampling) -> Answer:
    """What the simulated engine must answer: retrieve, decode, retrieve, decode, in a plain loop. Takes no latency."""
    model, retriever = SimulatedModel(), SimulatedRetriever()
    bound = workload.bind(model, retriever)
    context, tokens, steps = bound.prompt(prompt)[0], list[int](), list[Committed]()
    begun = len(context)
    ended = False
    while not ended:
        queries = retriever.encode([bound.query(context, None)])
        (truth,) = retriever.search(queries, bound.top_k)
        step: list[int] = []
        while not ended and len(step) < bound.retrieval_stride:
            logits = np.zeros(VOCABULARY, dtype=np.float32)
            logits[_next(bound.prefix(context, truth))] = 1.0
            step.append(sampling.pick(logits, len(context) - begun))
            context.append(step[-1])
            ended = step[-1] in model.end_tokens or len(context) - begun == max_new_tokens
        tokens += step
        source = Source(int(truth.ids[0]), "", float(truth.scores[0]))
        steps.append(Committed(session=0, text="", tokens=tuple(step), step=len(steps), document=source))
    return Answer(model.decode(tokens), tuple(tokens), tuple(steps), Statistics(new_tokens=len(tokens)))


def simulated_engine(options: ServingOptions, model: SimulatedModel, *, query_s: float = 0.0) -> Engine:
    """An engine of which nothing is real but the pipeline; a search takes the set latency."""
    retriever = SimulatedRetriever(
        call_s=options.retriever_latency, query_s=query_s, concurrency=options.retriever_concurrency
    )
    return Engine(options, model, retriever, SimulatedRetriever(), InContext())


def _next(tokens: Tokens) -> int:
    seen = tokens[:1].tobytes() + tokens[-_MEMORY:].tobytes()
    return int.from_bytes(blake2b(seen, digest_size=8).digest(), "little") % VOCABULARY


def _sum(text: str) -> Scores:
    vector = np.zeros(_DIMENSION, dtype=np.float32)
    for age, word in enumerate(reversed(text.split())):
        sign, place = divmod(int(word), _DIMENSION)
        vector[place] += (1 - 2 * (sign % 2)) * (3 if age < _NEWEST else 1)
    return vector


def _document(id: int) -> Document:
    chance = random.Random(f"document {id}")
    return Document(id, str(id), " ".join(str(chance.randrange(1, VOCABULARY)) for _ in range(_WORDS)))


def _sleep(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)
