"""Dense Passage Retrieval's two encoders: one BERT for questions, another for titled passages (contexts)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Document
from .encoder import batches, check_device, finite
from .errors import BadKnowledge, MissingExtra
from .model_folder import fingerprint, model_folder, reading

LENGTH = 256
"""Word pieces that DPR was trained to read, of a question or of title and text together, markers included."""


class DPRQuestionEncoder:
    """The question side, as a query encoder: a local folder or hub id in transformers' layout.

    The vector is that of the first token, projected if the model has a projection, as DPR defines it: float32 and not
    normalised, so DPR searches by inner product. A text takes a forward pass of its own, for the reason that
    `SentenceEncoder` gives. `name` is what a manifest calls it.

    Only safetensors weights are loaded and no code from the folder is run. Raises `MissingExtra` if a package is
    absent, `BadKnowledge` naming the folder if it holds anything but this side of a DPR, whole, and `ValueError` for a
    device that is not there.
    """

    def __init__(self, name_or_path: str | Path, *, device: str = "cpu", name: str = "") -> None:
        self._tower = _Tower("question", name_or_path, device)
        self._fingerprint = ""
        self.name = name or f"dpr:{name_or_path}"
        self.dimension = self._tower.dimension

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One vector a text, float32 [n, dimension]; thread-safe."""
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        return np.concatenate([self._tower.vectors(self._tower.tokens([text])) for text in texts])

    def fingerprint(self) -> str:
        """See `NamedQueryEncoder`."""
        self._fingerprint = self._fingerprint or fingerprint(self._tower.folder)
        return self._fingerprint


class DPRContextEncoder:
    """The context side: encodes passages for the queries of `question`, the folder or hub id of the other side.

    That one is not loaded; an index remembers its fingerprint, since it is the one to search with. A passage's title
    and text are the two segments of a pair, cut together at `LENGTH`; a passage without a title is one segment.
    Weights, vectors and errors are as with `DPRQuestionEncoder`.
    """

    def __init__(self, name_or_path: str | Path, *, question: str | Path, device: str = "cpu", name: str = "") -> None:
        self._tower = _Tower("context", name_or_path, device)
        self._question = model_folder(question, f"DPR question encoder {question}")
        self._fingerprints: dict[Path, str] = {}
        self.name = name or f"dpr:{question},{name_or_path}"
        self.dimension = self._tower.dimension

    def encode_passages(self, passages: Sequence[Document | str], *, batch_size: int = 32) -> NDArray[np.float32]:
        """One vector a passage, float32 [n, dimension]: see `PassageEncoder`."""
        pairs = [("", passage) if isinstance(passage, str) else (passage.title, passage.text) for passage in passages]
        tokens = self._tower.tokens([(title, text) if title else text for title, text in pairs])
        vectors = np.empty((len(tokens), self.dimension), dtype=np.float32)
        for rows in batches([len(ids) for ids in tokens], batch_size):
            vectors[rows] = self._tower.vectors([tokens[row] for row in rows])
        return finite(vectors, self.name)

    def fingerprint(self) -> str:
        """That of the question side."""
        return self._fingerprint_of(self._question)

    def passage_fingerprint(self) -> str:
        """That of this side."""
        return self._fingerprint_of(self._tower.folder)

    def _fingerprint_of(self, folder: Path) -> str:
        if folder not in self._fingerprints:
            self._fingerprints[folder] = fingerprint(folder)
        return self._fingerprints[folder]


def sides(name: str) -> tuple[str, str]:
    """The question's and the context's folder or hub id in "dpr:QUESTION,CONTEXT"; the latter may be missing."""
    question, _, context = name.removeprefix("dpr:").partition(",")
    if not question or "," in context:
        raise BadKnowledge(f"encoder {name}: is not of the form 'dpr:QUESTION,CONTEXT'; no folder's name may hold ','")
    return question, context


class _Tower:
    """Tokenizer and network of one side."""

    def __init__(self, side: str, name_or_path: str | Path, device: str) -> None:
        try:
            import torch
            import transformers
        except ImportError:
            raise MissingExtra("DPR encoders need: pip install 'ralmspec[local]'") from None
        check_device(device)
        what = f"DPR {side} encoder {name_or_path}"
        self.folder = model_folder(name_or_path, what)
        what = f"DPR {side} encoder {self.folder}"
        with reading(what):
            config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
        if config.model_type != "dpr":
            raise BadKnowledge(f"{what}: holds a {config.model_type!r} model; a DPR encoder's is 'dpr'")
        classes: dict[str, Any] = {
            "question": transformers.DPRQuestionEncoder,
            "context": transformers.DPRContextEncoder,
        }
        with reading(what), _no_report():
            self._network, report = classes[side].from_pretrained(
                self.folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        if missing := sorted(report["missing_keys"]):
            raise BadKnowledge(
                f"{what}: the weights lack {len(missing)} of its tensors, {missing[0]!r} among them; "
                "they were cut short, or are those of DPR's other side"
            )
        self._network.eval().requires_grad_(False).to(device)
        self._device = device
        self._pad = config.pad_token_id or 0
        self.dimension = int(config.projection_dim or config.hidden_size)
        with reading(what, "the tokenizer cannot be loaded"):
            self._tokenizer = _tokenizer(self.folder, min(LENGTH, config.max_position_embeddings))
        if self._tokenizer.get_vocab_size() > config.vocab_size:
            raise BadKnowledge(
                f"{what}: the tokenizer has {self._tokenizer.get_vocab_size()} tokens, the model knows "
                f"{config.vocab_size}; its files belong to another model"
            )

    def tokens(self, texts: Sequence[str | tuple[str, str]]) -> list[list[int]]:
        """Ids of texts or pairs, markers included, each at most `LENGTH`; of a pair the longer part is cut first."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    def vectors(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """One forward pass over a padded batch, float32 [n, dimension]."""
        import torch

        width = max(len(ids) for ids in tokens)
        ids = torch.tensor([[*row, *[self._pad] * (width - len(row))] for row in tokens], device=self._device)
        lengths = torch.tensor([len(row) for row in tokens], device=self._device)
        mask = (torch.arange(width, device=self._device) < lengths[:, None]).long()
        with torch.inference_mode():
            # Segment ids stay zero, for the second part of a pair too: so DPR was trained, and so are its published
            # vectors made, though BERT's own tokenizer would number the parts 0 and 1.
            vectors: NDArray[np.float32] = self._network(ids, attention_mask=mask).pooler_output.cpu().numpy()
        return vectors


@contextmanager
def _no_report() -> Iterator[None]:
    """transformers prints one of tensors that are missing, which is checked here, or too many: DPR's files as they
    were published hold a pooler that it never used."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _tokenizer(folder: Path, length: int) -> Any:
    # BertTokenizer by name: what AutoTokenizer picks for DPR puts every text in lower case, whatever the files say
    # (transformers 5.23). Without files it would make up a vocabulary of five markers, so they are asked for first.
    from transformers import BertTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise FileNotFoundError("there is neither tokenizer.json nor vocab.txt")
    tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.enable_truncation(length, strategy="longest_first")
    return tokenizer
