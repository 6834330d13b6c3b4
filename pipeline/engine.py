"""What the command line needs to serve: a model, a knowledge base and a workload, opened from paths."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ralmspec.retrievers.base import Drafter, Retriever
from ralmspec.retrievers.errors import BadKnowledge
from ralmspec.retrievers.index import SearchOptions
from ralmspec.retrievers.proposals import Scan
from ralmspec.retrievers.questions import Question, QuestionFolder
from ralmspec.retrievers.vectors import Memory
from ralmspec.stages.in_context import InContext
from ralmspec.stages.model import LanguageModel
from ralmspec.stages.workload import Workload

from .limits import Limits
from .thread_budget import ThreadBudget, cores

if TYPE_CHECKING:
    from ralmspec.stages.transformers_model import TransformersModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchingOptions:
    """The model, and how a knowledge base is searched. Threads: 0 for a fair share of the cores."""

    model: str
    retriever: str = "exact"
    memory: Memory = "map"
    scan: Scan = "codes"
    ef_search: int = 256
    probes: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    model_threads: int = 0
    index_threads: int = 0

    @property
    def threads(self) -> ThreadBudget:
        """As given, and where nothing is given a fair share of the cores."""
        share = ThreadBudget.of(cores())
        index = self.index_threads or share.index
        return ThreadBudget(model=self.model_threads or share.model, index=index, jvm=index)

    def search(self, *, documents: int = 0) -> SearchOptions:
        """How an index is opened, so that one search can bring so many documents."""
        return SearchOptions(
            threads=self.threads.index,
            memory=self.memory,
            scan=self.scan,
            ef_search=max(self.ef_search, documents),
            probes=self.probes,
            depth=max(SearchOptions().depth, documents),
            jvm_threads=self.threads.jvm,
        )

    def facts(self) -> dict[str, Any]:
        """For a report's environment; folders of data only by their names."""
        given = {name: value.name if isinstance(value, Path) else value for name, value in asdict(self).items()}
        return given | {"model_threads": self.threads.model, "index_threads": self.threads.index}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions(SearchingOptions):
    """The same, to serve sessions: how many share a forward pass, MiB for their keys and values (0 for the model's
    default), a set latency of the retriever, if any, the size of a session's cache, and the kind of index that guesses
    beside the caches, if any."""

    max_batch: int = 16
    kv_mib: int = 0
    retriever_latency: float = 0.0
    retriever_concurrency: int = 1
    cached_documents: int = Limits().cached_documents
    drafter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(ServingOptions):
    """In-context RaLM: where passages and questions lie.

    The knowledge base is the index folder `index`, searched as `retriever` says, or the passages and embeddings in
    `data`, searched exactly. Questions come from `data`.
    """

    data: Path | None = None
    corpus: str = "wikipedia"
    encoder: str = ""
    index: Path | None = None
    pad_to: int = 0


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model, knowledge base and workload. `index` is the retriever without its set latency, `drafter` what
    guesses beside the caches, if anything does."""

    options: ServingOptions
    model: LanguageModel
    retriever: Retriever
    index: Retriever
    workload: Workload
    questions: QuestionFolder | None = None
    drafter: Drafter | None = None

    @property
    def limits(self) -> Limits:
        """Those of a pipeline over this engine."""
        return Limits(cached_documents=self.options.cached_documents)

    @property
    def description(self) -> str:
        """What a report calls the retriever."""
        return self.retriever.description


def open_engine(options: EngineOptions) -> Engine:
    """Load everything; blocking, some seconds. Raises `BadModel`, `BadKnowledge` or `MissingExtra`, naming the file."""
    options.threads.apply()
    index = _from_index(options, options.index) if options.index else _from_data(options, options.data)
    drafter = _drafter(options) if options.drafter else None
    model = load_model(options)
    questions = QuestionFolder(options.data) if options.data else None
    return Engine(options, model, delayed(index, options), index, InContext(), questions, drafter)


def load_model(options: ServingOptions) -> "TransformersModel":
    """The model, with KV memory for the sessions that are to be served."""
    from ralmspec.stages.transformers_model import TransformersModel

    return TransformersModel.load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        max_batch=options.max_batch,
        pass_tokens=max(512, options.max_batch),
        kv_bytes=options.kv_mib << 20,
    )


def delayed(index: Retriever, options: ServingOptions) -> Retriever:
    """The index as it is, or with a set latency."""
    from ralmspec.retrievers.latency import SetLatency

    if options.retriever_latency > 0:
        return SetLatency(index, options.retriever_latency, options.retriever_concurrency)
    return index


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
    from ralmspec.retrievers.index import open_index

    if options.pad_to:
        raise BadKnowledge("an index cannot be padded: use --pad-to with --data alone")
    encoder = open_encoder(options.encoder, device=options.device) if options.encoder else None
    return open_index(folder, options.retriever, options.search(), encoder=encoder, device=options.device)


def _drafter(options: EngineOptions) -> Retriever:
    if options.index is None:
        raise BadKnowledge(
            f"the drafter {options.drafter!r} is another kind of an index folder: build one with both kinds "
            "(`ralmspec index build PASSAGES DIR --kinds exact,hnsw`) and give it as --index"
        )
    return _from_index(replace(options, retriever=options.drafter), options.index)


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
    scan, threads = options.scan, options.threads.index
    if options.pad_to:
        return PaddedDense(passages, corpus.embeddings, encoder, pad_to=options.pad_to, scan=scan, threads=threads)
    return ExactDense(passages, corpus.embeddings, encoder, scan=scan, threads=threads)
