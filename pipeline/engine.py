"""What the command line needs to serve: a model, a knowledge base and questions, opened from paths."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ralmspec.retrievers.base import Retriever
from ralmspec.retrievers.corpus import Corpus, Question
from ralmspec.retrievers.errors import BadKnowledge, MissingExtra
from ralmspec.stages.model import LanguageModel


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Where things lie and how they are loaded; the defaults suit two cores."""

    model: str
    data: Path
    corpus: str = "wikipedia"
    encoder: str = "minilm"
    dtype: str = "float32"
    device: str = "cpu"
    model_threads: int = 1
    index_threads: int = 1
    retriever_latency: float = 0.0
    retriever_concurrency: int = 1
    pad_to: int = 0

    def facts(self) -> dict[str, str | int | float]:
        """For a report's environment; the data folder only by its name."""
        return asdict(self) | {"data": self.data.name}


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model and knowledge base. `index` is the retriever without its set latency."""

    options: EngineOptions
    model: LanguageModel
    retriever: Retriever
    index: Retriever
    corpus: Corpus
    description: str


def open_engine(options: EngineOptions) -> Engine:
    """Load everything; blocking, some seconds. Raises `BadModel`, `BadKnowledge` or `MissingExtra`, naming the file."""
    from ralmspec.retrievers.dense import ExactDense
    from ralmspec.retrievers.encoder import SentenceEncoder
    from ralmspec.retrievers.latency import SetLatency
    from ralmspec.retrievers.padded import PaddedDense
    from ralmspec.retrievers.passages import Passages
    from ralmspec.stages.transformers_model import TransformersModel

    limit_threads(options.model_threads)
    corpus = Corpus.find(options.data, options.corpus)
    encoder = SentenceEncoder(options.encoder, device=options.device)
    passages = Passages(corpus.passages)
    index: ExactDense
    if options.pad_to:
        index = PaddedDense(passages, corpus.embeddings, encoder, pad_to=options.pad_to, threads=options.index_threads)
    else:
        index = ExactDense(passages, corpus.embeddings, encoder, threads=options.index_threads)
    retriever: Retriever = index
    description = index.description
    if options.retriever_latency > 0:
        delayed = SetLatency(index, options.retriever_latency, options.retriever_concurrency)
        retriever, description = delayed, delayed.description
    model = TransformersModel.load(options.model, device=options.device, dtype=options.dtype)
    return Engine(options, model, retriever, index, corpus, description)


def limit_threads(model: int) -> None:
    """Give torch so many threads (the index has its own): pools that spin on the same cores cost a factor of ten."""
    try:
        import torch
    except ImportError:
        raise MissingExtra("serving a local model needs: pip install 'ralmspec[local]'") from None
    torch.set_num_threads(model)


def choose_questions(corpus: Corpus, sets: Sequence[str], count: int) -> list[tuple[str, Question]]:
    """The first `count` questions of every set, each with its set's name. Unknown sets raise `BadKnowledge`."""
    chosen = [(name, question) for name in sets for question in corpus.questions(name)[:count]]
    if not chosen:
        raise BadKnowledge(f"{corpus.folder}: no question was chosen; sets here: {', '.join(corpus.question_sets())}")
    return chosen
