"""ralmspec: iterative retrieval-augmented generation, served with speculation, with the output of sequential serving.

The layers, and which way imports go (a test holds it):

    examples   benchmarks   tests
         │          │         │
         ▼          ▼         ▼
    ralmspec.pipeline     what a program touches
      Pipeline ─ SessionStream          open once; a context-managed stream of events per request
      Runner ─ ThreadWorker             the only task group; a thread for each kind of call
      Admission ─ Limits                who is let in: slots, KV memory, and a waiting room in front of them
      Sequential, Synchronous,          arrangements: the same stages, four sets of two decisions
      Asynchronous, Continuous          ... and Adaptive, which chooses among them
         │
         ▼
    ralmspec.stages       what moves, and who works on it
                                   ┌──────────────────────────────────────────────┐
                                   ▼                                              │
      admit ──► Switch ──Turn──► Lookup     query, guess: a step begins   ──Session──► Switch
                   │             Generate   one forward pass, one token           │
                   │             Verify     one search, verdicts: commit          │
                   │                        or ROLLBACK (a write, upstream)       │
                   │             Prefetch   ids → rows in the session's cache ────┘
                   └─Event──► output stages ──► the caller
      Session                           state, changed only in synchronous sections
      LanguageModel, Workload           prefix in, tokens out; how to ask and what to condition on
         │
         ▼
    ralmspec.retrievers   the knowledge base
      Retriever, SessionCache           ranked documents for queries; the same scores for chosen documents

Importing this package loads none of torch, transformers, faiss or sentence-transformers.
"""

from ralmspec.retrievers.base import Bounding as Bounding
from ralmspec.retrievers.base import Document as Document
from ralmspec.retrievers.base import Drafter as Drafter
from ralmspec.retrievers.base import Query as Query
from ralmspec.retrievers.base import Ranking as Ranking
from ralmspec.retrievers.base import Retriever as Retriever
from ralmspec.retrievers.errors import BadKnowledge as BadKnowledge
from ralmspec.retrievers.errors import MissingExtra as MissingExtra
from ralmspec.retrievers.errors import RalmspecError as RalmspecError
from ralmspec.retrievers.errors import RetrieverFailed as RetrieverFailed
from ralmspec.retrievers.retrying import Retrying as Retrying
from ralmspec.stages.arrangement import Arrangement as Arrangement
from ralmspec.stages.errors import BadModel as BadModel
from ralmspec.stages.errors import DocumentTooLong as DocumentTooLong
from ralmspec.stages.errors import EmptyPrompt as EmptyPrompt
from ralmspec.stages.errors import ModelFailed as ModelFailed
from ralmspec.stages.errors import PromptTooLong as PromptTooLong
from ralmspec.stages.in_context import InContext as InContext
from ralmspec.stages.knn_lm import KnnLM as KnnLM
from ralmspec.stages.messages import Committed as Committed
from ralmspec.stages.messages import Done as Done
from ralmspec.stages.messages import Drafted as Drafted
from ralmspec.stages.messages import Event as Event
from ralmspec.stages.messages import RolledBack as RolledBack
from ralmspec.stages.messages import Source as Source
from ralmspec.stages.model import LanguageModel as LanguageModel
from ralmspec.stages.sampling import Sampling as Sampling
from ralmspec.stages.stage import Inbox as Inbox
from ralmspec.stages.stage import Outbox as Outbox
from ralmspec.stages.stage import Stage as Stage
from ralmspec.stages.stage import Worker as Worker
from ralmspec.stages.statistics import Statistics as Statistics
from ralmspec.stages.stride import OS3 as OS3
from ralmspec.stages.stride import FixedStride as FixedStride
from ralmspec.stages.trace import Span as Span
from ralmspec.stages.workload import Workload as Workload

from .adaptive import Adaptive as Adaptive
from .arrangements import Asynchronous as Asynchronous
from .arrangements import Continuous as Continuous
from .arrangements import Sequential as Sequential
from .arrangements import Synchronous as Synchronous
from .errors import Cancelled as Cancelled
from .errors import DeadlineExceeded as DeadlineExceeded
from .errors import EngineDead as EngineDead
from .errors import NotServing as NotServing
from .errors import Overloaded as Overloaded
from .errors import Stalled as Stalled
from .limits import Limits as Limits
from .line_up import beyond as beyond
from .line_up import published as published
from .pipeline import Pipeline as Pipeline
from .speculation import Chooser as Chooser
from .speculation import Speculation as Speculation
from .stream import Answer as Answer
from .stream import SessionStream as SessionStream
