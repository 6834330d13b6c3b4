"""A session served by hand: a test plays the stages, the clock stands still, and events go into a list."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fakes import FakeModel, FakeRetriever

from ralmspec.pipeline import Arrangement, Committed, Event, InContext, Query, Ranking
from ralmspec.retrievers.cache import SessionCache
from ralmspec.stages.load import Load
from ralmspec.stages.messages import Check, Decoded, Pass, Place, Turn, Verdict
from ralmspec.stages.model import Prefix, read_to_end
from ralmspec.stages.request import Request
from ralmspec.stages.session import Reconsider, Session
from ralmspec.stages.step import Move

PROMPT = (3, 1, 4)


class Hand:
    """Plays the stages by hand. The documents that searches find are given, or the retriever's own."""

    def __init__(
        self,
        speculation: Arrangement,
        *,
        model: Any = None,
        retriever: Any = None,
        stride: int = 2,
        unread_limit: int = 1000,
        reconsider: Reconsider | None = None,
        window: int = 0,
        **request: Any,
    ) -> None:
        self.model = model or FakeModel(ends=False)
        self.retriever = retriever or FakeRetriever(documents=20)
        self.events: list[Event] = []
        self.at = 0.0
        self.load = Load()
        self.session = Session(
            1,
            Request(prompt=PROMPT, unread_limit=unread_limit, end_tokens=self.model.end_tokens, **request),
            workload=InContext(retrieval_stride=stride).bind(self.model, self.retriever),
            arrangement=speculation,
            reconsider=reconsider or (lambda arrangement, taken: arrangement),
            window=window or speculation.window,
            load=self.load,
            cache=SessionCache(self.retriever),
            render=self.model.decode,
            emit=self.emit,
            now=lambda: self.at,
        )

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.session.reader.told()

    def ask(self) -> Query:
        assert self.session.move is Move.LOOK
        (query,) = self.retriever.encode([self.session.question()])
        return query

    def look(self) -> None:
        query = self.ask()
        self.session.looked(self.session.epoch, query, self.guess(query), seconds=0.0)

    def guess(self, query: Query) -> Ranking | None:
        return self.session.cache.best(query) if self.session.arrangement.guesses else None

    def decode(self, *tokens: int) -> None:
        for token in tokens:
            made = self.session.next_pass()
            assert made is not None
            self.session.decoded(made, Decoded((token,), None), seconds=0.0)

    def turn(self, checks: Sequence[Check]) -> Turn:
        return Turn(session=1, epoch=self.session.epoch, place=Place.VERIFY, issued=0.0, checks=tuple(checks))

    def launch(self) -> Sequence[Check]:
        assert self.session.checks_due
        return self.session.take_checks(self.turn(self.session.launch()))

    def judge(self, checks: Sequence[Check], *documents: int) -> None:
        verdicts = [
            Verdict(
                session=1,
                epoch=check.epoch,
                step=check.step,
                truth=Ranking(np.array([document]), np.ones(1, dtype=np.float32)),
                right=check.guess is not None and bool(check.guess.ids[0] == document),
                wanted=np.array([100 + document], dtype=np.int64),
            )
            for check, document in zip(checks, documents, strict=True)
        ]
        if self.session.arrangement.guesses:
            self.session.cache.insert(np.array(documents), self.retriever.rows(np.array(documents)))
        self.session.judge(verdicts, search_s=0.0, verification_s=0.0)
        self.session.come_home(self.turn(checks))

    def guesses(self, *documents: int) -> None:
        """What the cache will guess, one look-up after the other."""
        queue = list(documents)

        def best(query: Query, n: int = 1) -> Ranking:
            return Ranking(np.array([queue.pop(0)]), np.zeros(1, dtype=np.float32))

        self.session.cache.best = best  # type: ignore[method-assign]

    def begin(self, document: int = 5) -> None:
        """The first retrieval, before which nothing is known."""
        self.look()
        assert self.session.move is None, "without a document there is nothing to decode"
        self.judge(self.launch(), document)

    def play(self, *steps: tuple[int, ...], guesses: tuple[int, ...]) -> None:
        """From the first retrieval on: these steps, the later ones under these guesses; the next query is formed."""
        self.begin()
        self.guesses(*guesses)
        for tokens in steps:
            self.decode(*tokens)
            self.look()

    def committed(self) -> list[tuple[int, ...]]:
        return [event.tokens for event in self.events if isinstance(event, Committed)]

    def say(self, made: Pass) -> None:
        """The pass, by the model, as Generate would have it done."""
        proposed = made.proposed or ()
        prefix = self.session.workload.prefix((*made.context, *proposed), made.retrieved)
        frontier = read_to_end(self.model, Prefix(session=1, tokens=prefix, proposed=len(proposed)))
        rows = [*(() if frontier.proposed is None else frontier.proposed), frontier.logits]
        said = tuple(made.request.sampling.pick(row, made.position + n) for n, row in enumerate(rows))
        self.session.decoded(made, Decoded(said, None), seconds=0.0)
