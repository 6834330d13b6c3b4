"""The root of every error this library raises, and the leaves that retrieval adds.

    RalmspecError
    ├── MissingExtra      an optional package is not installed; the message names the remedy
    ├── BadKnowledge      passages, embeddings or an index that cannot be served as they are
    └── RetrieverFailed   a search raised, or answered with something that is no ranking

The layers above add their own leaves to the same root (`ralmspec.stages.errors`, `ralmspec.pipeline.errors`).
"""


class RalmspecError(Exception):
    """Root of the errors that ralmspec raises on purpose."""


class MissingExtra(RalmspecError):
    """An optional dependency is absent; the message says what to install."""


class BadKnowledge(RalmspecError):
    """A file of the knowledge base is missing, damaged, or does not fit the others."""


class RetrieverFailed(RalmspecError):
    """A retriever raised, or returned something that is not a ranking."""
