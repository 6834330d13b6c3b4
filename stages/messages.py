"""Everything that moves: turns and work between the stages, verdicts on their way back, events to the caller.

Queues carry `Turn`s. The work itself waits with the session, so a rollback annihilates it in place and no queue can
overflow; only launched checks travel with their turn. A `Pass`, a `Check` and a `Verdict` are the immutable inputs and
results of thread calls. All of them name (session, epoch), and one of an older epoch is dropped where it arrives (R4).
"""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ralmspec.retrievers.base import Ids, Query, Ranking
from ralmspec.retrievers.cache import SessionCache

from .model import Frontier
from .request import Request

if TYPE_CHECKING:
    from .statistics import Statistics


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Message:
    """Belongs to a session; `epoch` is the session's when it was made: it grows with every rollback, and with the end.

    A message is the same as itself only.
    """

    session: int
    epoch: int


class Place(Enum):
    """Where something of a session can be out: at one of the four stages, or its end on the way to the caller."""

    LOOKUP = "lookup"
    GENERATE = "generate"
    VERIFY = "verify"
    PREFETCH = "prefetch"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn(Message):
    """A session's turn at a stage; what is to be done there, the session knows. `issued` in seconds.

    A turn at Verify brings its `checks` along, since several may be out at once. A stale turn only goes home: the
    switch then issues one that fits.
    """

    place: Place
    issued: float
    checks: "tuple[Check, ...]" = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass(Message):
    """One forward pass: the next token of `step`, after `context`, under the retrieved documents.

    `position` counts generated tokens from 0; `context` is the prompt and all that was generated before. Where queries
    need the frontier, `frontier` is that of the context, so the token is chosen first, and the pass brings the frontier
    behind it. Without a frontier and without documents the pass only reads: it brings the frontier of the context.

    A pass for a step in doubt comes with what is `proposed`, drafted after `context` under other documents: it brings
    the token for the place of each, and the one behind them.
    """

    step: int
    position: int
    context: tuple[int, ...]
    retrieved: Ranking | None
    frontier: Frontier | None
    request: Request
    proposed: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """What a forward pass brings: a token, or the frontier behind it, or both; several tokens where some were proposed.

    Of those, the ones up to the first that differs from its proposal count.
    """

    tokens: tuple[int, ...]
    frontier: Frontier | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Check(Message):
    """A step's query, to be put to the knowledge base, and what is needed to judge the step's guess, if it has one.

    Where the query was made from a frontier, that comes along: the step's one token, at `position`, can be chosen from
    it under the guess and under the true documents, with no forward pass. `documents` are to be found, at least;
    `cache` gets them, if there is one.
    """

    step: int
    query: Query
    documents: int
    guess: Ranking | None
    position: int
    frontier: Frontier | None
    request: Request
    cache: SessionCache | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdict(Message):
    """What the knowledge base says of a step's query. `truth` holds the documents of one search, best first; `right`
    says whether the step, begun under its guess, is what it would be under the truth.

    The documents that condition the step (the first ones of `truth`) are in the session's cache by now, if there is
    one; `wanted` are others that should be.
    """

    step: int
    truth: Ranking
    right: bool
    wanted: Ids


@dataclass(frozen=True, slots=True)
class Source:
    """Where a step's text comes from: the document and its score."""

    id: int
    title: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something the caller of a session may see."""

    session: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Event):
    """Verified output of one step: final, never taken back. The texts of all events joined are the answer."""

    text: str
    tokens: tuple[int, ...]
    step: int
    document: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted(Event):
    """One token written under a guessed document (only with `drafts=True`); a `RolledBack` may retract it.

    The `Committed` of the step replaces its drafts. They may be fewer than its tokens: a guess may be found right while
    the step is being written.
    """

    text: str
    token: int
    step: int
    document: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(Event):
    """Every draft from `step` on is retracted: the guess was wrong, `document` is the true one (with `drafts=True`).

    `tokens` drafts are meant; some of them may come again with the `Committed` of the step.
    """

    step: int
    tokens: int
    document: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Event):
    """The last event of a session that ended well; `error` is set, and raised to the caller, where it did not."""

    statistics: "Statistics"
    error: BaseException | None = None
