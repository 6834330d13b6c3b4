"""A local language model over transformers: token prefixes in, logits and states out, keys and values reused."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint, fingerprint, read
from .errors import ModelFailed
from .kv_slots import KvSlots, Slot
from .model import Frontier, Prefix, Tokens
from .packed_attention import PackedAttention, Segment, attending

_Array = TypeVar("_Array", bound=NDArray[Any])
_KV_BYTES = 2 << 30


class TransformersModel:
    """GPT-2, OPT and LLaMA on CPU or CUDA, up to `max_batch` sessions in a forward pass. Satisfies `LanguageModel`.

    Every session has up to four KV slots by default, so that the path being drafted and the path being checked can both
    be alive, and one of the last documents that comes again is found, with what was written under it. A pass forwards
    only the tokens its slot does not hold, at least one. The sessions' tokens stand in one row, none padded
    (`PackedAttention`), so it does not matter which sessions share a pass, or how long they are. It forwards
    `pass_tokens` tokens at most: those who lack one token come first, then the others as they stand; the rest of a long
    prefix is read by later passes, so nobody waits long for it. A proposal and the token before it are read in one
    pass: where they are all that one prefix lacks and do not fit, the first such one goes beyond `pass_tokens`. So
    every pass answers those who lack one token, and the first of the others gets on.

    Who shares a pass changes logits by rounding only: about 1e-6 in float32, 1e-15 in float64.

    A frontier's key is the hidden state that enters the last feed-forward layer (`FeedForwardInput`), `key_dimension`
    wide. `keys` and `evaluate` read whole texts at once and touch no session: they may run in another thread than
    `forward`, at the same time.

    Counters, for reports; a pass of `forward` adds to them when it ends:
    `forward_passes`; `prefilled_tokens` went through the network (decoded ones too); `reused_tokens` did not have to;
    `seconds` of wall-clock time inside `forward`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        slots_per_session: int = 4,
        max_batch: int = 16,
        pass_tokens: int = 512,
        kv_bytes: int = 0,
    ) -> None:
        import torch

        if not 1 <= max_batch <= pass_tokens:
            raise ValueError(f"max_batch={max_batch}, pass_tokens={pass_tokens}: at least 1, and a token for each")
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
        self.max_batch = max_batch
        self._pass_tokens = pass_tokens
        layout = checkpoint.kv_layout
        self._slots = KvSlots(
            layout,
            per_session=slots_per_session,
            longest=self.context_length,
            budget=kv_bytes or max(_KV_BYTES, 4 * self.context_length * layout.token_bytes),
        )
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
        **settings: int,
    ) -> "TransformersModel":
        """Read a folder or a hub id: safetensors only, no code from the model's author.

        `dtype` is one of float32, float64, bfloat16, float16. In the two short ones a recomputed prefix may flip a
        token whose two best logits nearly tie. Raises `BadModel` for files that are missing, damaged or of a family
        that is not served, `MissingExtra`, and `ValueError` for a device or dtype that is not there. `settings` are
        those of the constructor: `slots_per_session`, `max_batch`, `pass_tokens`, and `kv_bytes`, the memory for keys
        and values of all sessions (0: two GiB, or four prefixes of `context_length` if those take more).
        """
        return cls(read(path_or_hub_id, device=device, dtype=dtype), **settings)

    @property
    def kv_tokens(self) -> int:
        """How many prefix tokens there is KV memory for, over all sessions."""
        return self._slots.budget // self._slots.layout.token_bytes

    def encode(self, text: str) -> list[int]:
        """Text to tokens: none added, none special, whatever the text contains. Thread-safe."""
        return self._tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens to text, special tokens left out. Thread-safe."""
        return self._tokenizer.decode(tokens)

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        """Logits after each prefix, float32, or float64 where the model is, and its key, always float32. Those in the
        places of proposed tokens come from the same pass, and cost about as much as reading these tokens.

        None for a prefix that is not read to its end yet; a `ModelFailed` for one whose numbers are not finite. Raises
        `ValueError` before any work for a prefix that is empty, longer than `context_length`, has tokens outside the
        vocabulary or proposes them all; `ModelFailed` if the pass raises. After a fault the session's next pass starts
        from what its other slot holds, or afresh.
        """
        wanted = [self._wanted(prefix) for prefix in prefixes]
        if not wanted:
            return []
        start = time.perf_counter()
        taken = [self._slots.take(p.session, p.tokens, p.proposed) for p in wanted]
        try:
            with _passing(f"{len(wanted)} prefixes of up to {max(len(p.tokens) for p in wanted)} tokens"):
                segments = self._segments(taken, wanted)
                outcomes = self._pass(segments, wanted)
        except BaseException:  # nobody knows what the slots hold now
            for slot in taken:
                self._slots.drop(slot)
            raise
        finally:
            self.seconds += time.perf_counter() - start
        for prefix, slot, segment, outcome in zip(wanted, taken, segments, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._slots.drop(slot)
            else:
                self._slots.put(prefix.session, slot, prefix.tokens[: segment.end])
        self.forward_passes += 1
        self.prefilled_tokens += sum(segment.count for segment in segments)
        self.reused_tokens += sum(segment.kept for segment in segments)
        return outcomes

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
        """Memory that all sessions' keys and values take, in bytes."""
        return self._slots.bytes()

    def held_sessions(self) -> int:
        """How many sessions hold keys and values."""
        return self._slots.sessions()

    def _wanted(self, prefix: Prefix) -> Prefix:
        """Checked, with tokens of its own: slots remember them, and the caller may go on writing into its array."""
        tokens = self._checked(prefix.tokens)
        if not 0 <= prefix.proposed < len(tokens):
            raise ValueError(
                f"a prefix of {len(tokens)} tokens proposes {prefix.proposed} of them: "
                "none is the least, and one must stand before them"
            )
        return replace(prefix, tokens=tokens)

    def _checked(self, tokens: Tokens, axes: int = 1) -> Tokens:
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

    def _segments(self, taken: Sequence[Slot], wanted: Sequence[Prefix]) -> list[Segment]:
        """Who forwards how many tokens in this pass, with room for them in the slots."""
        missing = [len(prefix.tokens) - len(slot.tokens) for slot, prefix in zip(taken, wanted, strict=True)]
        left = self._pass_tokens - sum(number == 1 for number in missing)
        segments: list[Segment] = []
        start = 0
        for slot, prefix, number in zip(taken, wanted, missing, strict=True):
            before = number - 1 - prefix.proposed  # what is to be read before the tail, which is read at once
            at_once = number == 1 or number <= left or (not before and left >= 0)
            count = number if at_once else min(before, max(0, left))
            left -= count if number > 1 else 0
            kept = len(slot.tokens)
            self._slots.grow(slot, kept + count)
            segments.append(Segment(slot, start, count, kept))
            start += count
        return segments

    def _pass(self, segments: Sequence[Segment], wanted: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        torch = self._torch
        fresh = [prefix.tokens[s.kept : s.end] for s, prefix in zip(segments, wanted, strict=True)]
        positions = [np.arange(s.kept, s.end) for s in segments]
        # Of those that are read to their end, the places in the row whose logits are wanted; of others none.
        asked = [
            np.arange(s.start + s.count)[-1 - prefix.proposed :] if s.end == len(prefix.tokens) else np.arange(0)
            for s, prefix in zip(segments, wanted, strict=True)
        ]
        rows = np.concatenate(asked)
        packed = PackedAttention([segment for segment in segments if segment.count])
        with torch.inference_mode(), self._states.kept() as states, attending(packed):
            logits = self._network(
                input_ids=self._row(fresh),
                position_ids=self._row(positions),
                use_cache=False,
                logits_to_keep=torch.from_numpy(rows).to(self._network.device),
            ).logits
            every = self._as_logits(logits[0])
            keys = self._as_keys(states[0].reshape(-1, self.key_dimension)[rows], (len(rows),))
        ends = np.cumsum([len(places) for places in asked])[:-1]
        return list(map(self._frontier, wanted, np.split(every, ends), np.split(keys, ends)))

    def _frontier(self, prefix: Prefix, logits: Any, keys: Any) -> Frontier | Exception | None:
        """Of one session, copied, so that one that is kept does not keep those of the whole pass."""
        if not len(logits):
            return None
        try:
            what = f"a prefix of {len(prefix.tokens)} tokens"
            proposed = _finite(what, logits[:-1].copy()) if prefix.proposed else None
            return Frontier(_finite(what, logits[-1].copy()), _finite(what, keys[-1].copy()), proposed)
        except ModelFailed as error:
            return error

    def _row(self, pieces: Sequence[Tokens]) -> Any:
        return self._torch.from_numpy(np.concatenate(pieces))[None].to(self._network.device)

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
