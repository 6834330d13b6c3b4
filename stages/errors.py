"""The errors that decoding adds to the root of `ralmspec.retrievers.errors`.

RalmspecError
├── ModelFailed       a forward pass raised, or its logits are no numbers to choose from
├── WorkerLost        a call into model, encoder or index hangs; nothing can be served any more
├── InvariantBroken   a bug of this library: something its rules exclude has happened
├── BadModel          a language model that cannot be served as it is; the message says what to do
├── EmptyPrompt       nothing to retrieve with
├── PromptTooLong     a prompt over its limit, where cutting was refused
└── DocumentTooLong   a document over its limit, where cutting was refused
"""

from ralmspec.retrievers.errors import RalmspecError


class ModelFailed(RalmspecError):
    """A forward pass raised or gave NaN; its cause, where there is one, is `__cause__`. Other sessions go on."""


class WorkerLost(RalmspecError):
    """A blocking call did not end in time, so its thread is lost; the stage that made it dies."""


class InvariantBroken(RalmspecError):
    """A rule of the pipeline was broken. Never expected, never hidden: the engine dies of it."""


class BadModel(RalmspecError):
    """A model that is missing, damaged, of a family that is not served, or not stored as safetensors."""


class EmptyPrompt(RalmspecError):
    """A prompt without a word in it."""


class PromptTooLong(RalmspecError):
    """A prompt longer than the workload allows."""


class DocumentTooLong(RalmspecError):
    """A document longer than the workload allows."""
