"""What the command line needs to serve: a model, a knowledge base and questions, opened from paths."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ralmspec.retrievers.base import Retriever
from ralmspec.retrievers.errors import BadKnowledge
from ralmspec.retrievers.questions import Question, QuestionFolder
from ralmspec.retrievers.vectors import Memory
from ralmspec.stages.model import LanguageModel

from .thread_budget import ThreadBudget, cores


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Where things lie and how they are loaded.

    The knowledge base is the index folder `index`, searched as `retriever` says, or the passages and embeddings in
    `data`, searched exactly. Questions come from `data`. Threads: 0 for a fair share of the cores.
    """

    model: str
    data: Path | None = None
    corpus: str = "wikipedia"
    encoder: str = ""
    index: Path | None = None
    retriever: str = "exact"
    memory: Memory = "map"
    ef_search: int = 256
    probes: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    model_threads: int = 0
    index_threads: int = 0
    retriever_latency: float = 0.0
    retriever_concurrency: int = 1
    pad_to: int = 0

    @property
    def threads(self) -> ThreadBudget:
        """As given, and where nothing is given a fair share of the cores."""
        share = ThreadBudget.of(cores())
        index = self.index_threads or share.index
        return ThreadBudget(model=self.model_threads or share.model, index=index, jvm=index)

    def facts(self) -> dict[str, Any]:
        """For a report's environment; folders of data only by their names."""
        names = {name: path.name if path else None for name, path in (("data", self.data), ("index", self.index))}
        return asdict(self) | names | {"model_threads": self.threads.model, "index_threads": self.threads.index}


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model and knowledge base. `index` is the retriever without its set latency."""

    options: EngineOptions
    model: LanguageModel
    retriever: Retriever
    index: Retriever
    questions: QuestionFolder | None

    @property
    def description(self) -> str:
        """What a report calls the retriever."""
        return self.retriever.description


def open_engine(options: EngineOptions) -> Engine:
    """Load everything; blocking, some seconds. Raises `BadModel`, `BadKnowledge` or `MissingExtra`, naming the file."""
    from ralmspec.retrievers.latency import SetLatency
    from ralmspec.stages.transformers_model import TransformersModel

    options.threads.apply()
    index = _from_index(options, options.index) if options.index else _from_data(options, options.data)
    retriever = index
    if options.retriever_latency > 0:
        retriever = SetLatency(index, options.retriever_latency, options.retriever_concurrency)
    model = TransformersModel.load(options.model, device=options.device, dtype=options.dtype)
    return Engine(options, model, retriever, index, QuestionFolder(options.data) if options.data else None)


def choose_questions(folder: QuestionFolder | None, sets: Sequence[str], count: int) -> list[tuple[str, Question]]:
    """The first `count` questions of every set, each with its set's name. Unknown sets raise `BadKnowledge`."""
    if folder is None:
        raise BadKnowledge("there are no questions: give the folder that holds questions_SET.jsonl[.gz] as --data")
    chosen = [(name, question) for name in sets for question in folder.read(name)[:count]]
    if not chosen:
        raise BadKnowledge(f"{folder.folder}: no question was chosen; sets here: {', '.join(folder.sets()) or 'none'}")
    return chosen


def _from_index(options: EngineOptions, folder: Path) -> Retriever:
    from ralmspec.retrievers.encoder import open_encoder
    from ralmspec.retrievers.index import SearchOptions, open_index

    if options.pad_to:
        raise BadKnowledge("an index cannot be padded: use --pad-to with --data alone")
    search = SearchOptions(
        threads=options.threads.index,
        memory=options.memory,
        ef_search=options.ef_search,
        probes=options.probes,
        jvm_threads=options.threads.jvm,
    )
    encoder = open_encoder(options.encoder, device=options.device) if options.encoder else None
    return open_index(folder, options.retriever, search, encoder=encoder, device=options.device)


def _from_data(options: EngineOptions, folder: Path | None) -> Retriever:
    from ralmspec.retrievers.corpus import Corpus
    from ralmspec.retrievers.dense import ExactDense
    from ralmspec.retrievers.encoder import open_encoder
    from ralmspec.retrievers.padded import PaddedDense
    from ralmspec.retrievers.passages import Passages

    if folder is None:
        raise BadKnowledge("there is no knowledge base: give an index folder as --index, or a data folder as --data")
    if options.retriever != "exact":
        raise BadKnowledge(
            f"{folder}: a data folder is searched exactly; for {options.retriever!r} build an index "
            f"(`ralmspec index build PASSAGES DIR --kinds {options.retriever}`) and give it as --index"
        )
    corpus = Corpus.find(folder, options.corpus)
    encoder, passages = open_encoder(options.encoder or "minilm", device=options.device), Passages(corpus.passages)
    threads = options.threads.index
    if options.pad_to:
        return PaddedDense(passages, corpus.embeddings, encoder, pad_to=options.pad_to, threads=threads)
    return ExactDense(passages, corpus.embeddings, encoder, threads=threads)
