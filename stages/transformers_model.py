"""A local language model over transformers: token prefixes in, logits out, keys and values reused."""

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .checkpoint import Checkpoint, read
from .errors import ModelFailed
from .kv_slots import KvSlots
from .model import Frontier, Prefix, Tokens


class TransformersModel:
    """GPT-2, OPT and LLaMA on CPU or CUDA, one session at a time. Satisfies `LanguageModel`.

    Every session has up to two KV slots by default, so that the path being drafted and the path being checked, or two
    documents that take turns, can both be alive. A pass forwards only the tokens its slot does not hold, at least one.

    Counters, for reports; a pass adds to them when it ends:
    `forward_passes`; `prefilled_tokens` went through the network (decoded ones too); `reused_tokens` did not have to;
    `seconds` of wall-clock time inside `forward`.
    """

    max_batch = 1

    def __init__(self, checkpoint: Checkpoint, *, slots_per_session: int = 2) -> None:
        import torch
        from transformers.cache_utils import DynamicCache

        self._torch = torch
        self._network = checkpoint.network
        self._tokenizer = checkpoint.tokenizer
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
        """Logits after each prefix: float32, or float64 where the model is.

        Raises `ValueError` before any work for a prefix that is empty, longer than `context_length`, or has tokens
        outside the vocabulary; `ModelFailed` if a pass raises or its logits are not finite. The session's next pass
        then starts from what its other slot holds, or afresh.
        """
        checked = [(prefix.session, self._checked(prefix.tokens)) for prefix in prefixes]
        start = time.perf_counter()
        try:
            return [self._one(session, tokens) for session, tokens in checked]
        finally:
            self.seconds += time.perf_counter() - start

    def forget(self, session: int) -> None:
        """Free the session's slots."""
        self._slots.forget(session)

    def kv_bytes(self) -> int:
        """Memory that all sessions' keys and values take, in bytes; a slot inside a running pass is not counted."""
        return self._slots.bytes()

    def held_sessions(self) -> int:
        """How many sessions hold keys and values."""
        return self._slots.sessions()

    def _checked(self, tokens: Tokens) -> Tokens:
        # A copy: slots remember their tokens, and the caller may go on writing into its own array.
        own = np.array(tokens, dtype=np.int64, order="C")
        if own.ndim != 1 or own.size == 0:
            raise ValueError(f"a prefix is a row of at least one token, not an array of shape {own.shape}")
        if own.size > self.context_length:
            raise ValueError(
                f"the prefix has {own.size} tokens, the model takes at most {self.context_length}: "
                "shorten prompt, document or answer"
            )
        if own.min() < 0 or own.max() >= self.vocabulary:
            raise ValueError(
                f"the prefix has token ids {own.min()} to {own.max()}, the model knows 0 to {self.vocabulary - 1}"
            )
        return own

    def _one(self, session: int, tokens: Tokens) -> Frontier:
        try:
            slot, kept = self._slots.take(session, tokens)
            logits = self._pass(slot.cache, tokens[kept:])
        except Exception as error:  # the slot stays out: nobody knows what its cache holds now
            raise ModelFailed(
                f"the forward pass of a prefix of {len(tokens)} tokens raised {type(error).__name__}: {error}"
            ) from error
        if not np.isfinite(logits).all():
            raise ModelFailed(
                f"the logits of a prefix of {len(tokens)} tokens are not finite: check the weights, or widen the dtype"
            )
        self._slots.put(session, slot, tokens)
        self.forward_passes += 1
        self.prefilled_tokens += len(tokens) - kept
        self.reused_tokens += kept
        return Frontier(logits)

    def _pass(self, cache: Any, fresh: Tokens) -> Any:
        torch = self._torch
        with torch.inference_mode():
            inputs = torch.from_numpy(fresh)[None].to(self._network.device)
            logits = self._network(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            last = logits[0, -1]
            if last.dtype not in (torch.float32, torch.float64):
                last = last.float()
            return last.cpu().numpy()
