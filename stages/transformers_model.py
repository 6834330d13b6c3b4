"""A local language model over transformers: token prefixes in, logits and states out, keys and values reused."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint, fingerprint, read
from .errors import ModelFailed
from .kv_slots import KvSlots
from .model import Frontier, Prefix, Tokens

_Array = TypeVar("_Array", bound=NDArray[Any])


class TransformersModel:
    """GPT-2, OPT and LLaMA on CPU or CUDA, one session at a time. Satisfies `LanguageModel`.

    Every session has up to two KV slots by default, so that the path being drafted and the path being checked, or two
    documents that take turns, can both be alive. A pass forwards only the tokens its slot does not hold, at least one.

    A frontier's key is the hidden state that enters the last feed-forward layer (`FeedForwardInput`), `key_dimension`
    wide. `keys` and `evaluate` read whole texts at once and touch no session: they may run in another thread than
    `forward`, at the same time.

    Counters, for reports; a pass of `forward` adds to them when it ends:
    `forward_passes`; `prefilled_tokens` went through the network (decoded ones too); `reused_tokens` did not have to;
    `seconds` of wall-clock time inside `forward`.
    """

    max_batch = 1

    def __init__(self, checkpoint: Checkpoint, *, slots_per_session: int = 2) -> None:
        import torch
        from transformers.cache_utils import DynamicCache

        self._torch = torch
        self._network = checkpoint.network
        self._checkpoint = checkpoint
        self._fingerprint = ""
        self._states = checkpoint.feed_forward_input
        self._tokenizer = checkpoint.tokenizer
        self.name = checkpoint.source
        self.key_dimension = self._states.dimension
        self.context_length = checkpoint.context_length
        self.end_tokens = checkpoint.end_tokens
        self.start_tokens = checkpoint.start_tokens
        self.vocabulary = int(self._network.config.vocab_size)
        self._slots = KvSlots(lambda: DynamicCache(config=self._network.config), per_session=slots_per_session)
        self.forward_passes = 0
        self.prefilled_tokens = 0
        self.reused_tokens = 0
        self.seconds = 0.0

    @classmethod
    def load(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        slots_per_session: int = 2,
    ) -> "TransformersModel":
        """Read a folder or a hub id: safetensors only, no code from the model's author.

        `dtype` is one of float32, float64, bfloat16, float16. In the two short ones a recomputed prefix may flip a
        token whose two best logits nearly tie. Raises `BadModel` for files that are missing, damaged or of a family
        that is not served, `MissingExtra`, and `ValueError` for a device or dtype that is not there.
        """
        return cls(read(path_or_hub_id, device=device, dtype=dtype), slots_per_session=slots_per_session)

    def encode(self, text: str) -> list[int]:
        """Text to tokens: none added, none special, whatever the text contains. Thread-safe."""
        return self._tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens to text, special tokens left out. Thread-safe."""
        return self._tokenizer.decode(tokens)

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier]:
        """Logits after each prefix, float32, or float64 where the model is, and its key, always float32.

        Raises `ValueError` before any work for a prefix that is empty, longer than `context_length`, or has tokens
        outside the vocabulary; `ModelFailed` if a pass raises or its numbers are not finite. The session's next pass
        then starts from what its other slot holds, or afresh.
        """
        checked = [(prefix.session, self._checked(prefix.tokens)) for prefix in prefixes]
        start = time.perf_counter()
        try:
            return [self._one(session, tokens) for session, tokens in checked]
        finally:
            self.seconds += time.perf_counter() - start

    def fingerprint(self) -> str:
        """A checksum of the weights' and the tokenizer's files, in hex: a datastore's keys are for models with the
        same. Reads them, once: as they are at the first call. Raises `BadModel` if they are gone. Blocking."""
        self._fingerprint = self._fingerprint or fingerprint(self._checkpoint)
        return self._fingerprint

    def keys(self, tokens: Tokens) -> NDArray[np.float32]:
        """The keys after every token of every row: int64 [b, w] -> float32 [b, w, key_dimension]. Blocking.

        A row is a text of its own that begins at its first token. Nothing is computed that keys do not need. They are
        those of `forward` up to rounding; the same call gives the same bits again (same machine, device and number of
        threads). Raises as `forward` does.
        """
        with self._texts(tokens) as (inputs, what):
            states = self._states.alone(lambda: self._network.base_model(input_ids=inputs, use_cache=False))
            return _finite(what, self._as_keys(states, inputs.shape))

    def evaluate(self, tokens: Tokens) -> tuple[NDArray[np.floating[Any]], NDArray[np.float32]]:
        """Logits [b, w, vocabulary], as `forward` gives them, and keys, as `keys` does, after every token."""
        with self._texts(tokens) as (inputs, what), self._states.kept() as states:
            logits = self._as_logits(self._network(input_ids=inputs, use_cache=False).logits)
            return _finite(what, logits), _finite(what, self._as_keys(states[0], inputs.shape))

    def forget(self, session: int) -> None:
        """Free the session's slots."""
        self._slots.forget(session)

    def kv_bytes(self) -> int:
        """Memory that all sessions' keys and values take, in bytes; a slot inside a running pass is not counted."""
        return self._slots.bytes()

    def held_sessions(self) -> int:
        """How many sessions hold keys and values."""
        return self._slots.sessions()

    def _checked(self, tokens: Tokens, axes: int = 1) -> Tokens:
        # A copy: slots remember their tokens, and the caller may go on writing into its own array.
        own = np.array(tokens, dtype=np.int64, order="C")
        if own.ndim != axes or own.size == 0:
            expected = "a prefix is a row of" if axes == 1 else "texts are rows, equally long, of"
            raise ValueError(f"{expected} at least one token, not an array of shape {own.shape}")
        what = "the prefix" if axes == 1 else "each text"
        if own.shape[-1] > self.context_length:
            raise ValueError(
                f"{what} has {own.shape[-1]} tokens, the model takes at most {self.context_length}: "
                "shorten prompt, document or answer"
            )
        if own.min() < 0 or own.max() >= self.vocabulary:
            raise ValueError(
                f"{what} has token ids {own.min()} to {own.max()}, the model knows 0 to {self.vocabulary - 1}"
            )
        return own

    def _one(self, session: int, tokens: Tokens) -> Frontier:
        what = f"a prefix of {len(tokens)} tokens"
        with _passing(what):  # a slot whose pass fails stays out: nobody knows what its cache holds then
            slot, kept = self._slots.take(session, tokens)
            logits, key = self._pass(slot.cache, tokens[kept:])
            frontier = Frontier(_finite(what, logits), _finite(what, key))
        self._slots.put(session, slot, tokens)
        self.forward_passes += 1
        self.prefilled_tokens += len(tokens) - kept
        self.reused_tokens += kept
        return frontier

    def _pass(self, cache: Any, fresh: Tokens) -> tuple[Any, NDArray[np.float32]]:
        torch = self._torch
        with torch.inference_mode(), self._states.kept() as states:
            inputs = torch.from_numpy(fresh)[None].to(self._network.device)
            logits = self._network(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            # Copied, so that a key that is kept does not keep the states of the whole pass.
            last = states[0].reshape(len(fresh), self.key_dimension)[-1].clone()
            return self._as_logits(logits[0, -1]), self._as_keys(last, ())

    @contextmanager
    def _texts(self, tokens: Tokens) -> Iterator[tuple[Any, str]]:
        """Checked texts on the network's device and their name; what goes wrong inside is a `ModelFailed`."""
        own = self._checked(tokens, axes=2)
        what = f"{own.shape[0]} texts of {own.shape[1]} tokens"
        with _passing(what), self._torch.inference_mode():
            yield self._torch.from_numpy(own).to(self._network.device), what

    def _as_logits(self, logits: Any) -> Any:
        if logits.dtype not in (self._torch.float32, self._torch.float64):
            logits = logits.float()
        return logits.cpu().numpy()

    def _as_keys(self, states: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """OPT's layer gets its tokens in one row, whatever the texts; other layers get them as they are."""
        keys: NDArray[np.float32] = states.to("cpu", self._torch.float32).numpy()
        return keys.reshape(*shape, self.key_dimension)


@contextmanager
def _passing(what: str) -> Iterator[None]:
    try:
        yield
    except ModelFailed:
        raise
    except Exception as error:
        raise ModelFailed(f"the forward pass of {what} raised {type(error).__name__}: {error}") from error


def _finite(what: str, made: _Array) -> _Array:
    if not np.isfinite(made).all():
        raise ModelFailed(f"logits or keys of {what} are not finite: check the weights, or widen the dtype")
    return made
