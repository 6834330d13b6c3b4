"""Attention for several sessions in one forward pass: their tokens stand in one row, and each looks at its own past."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .kv_slots import Slot

NAME = "ralmspec_packed"
"""What transformers calls it."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """`count` fresh tokens of one session, from `start` on in the row; its slot has `kept` tokens before them."""

    slot: Slot
    start: int
    count: int
    kept: int

    @property
    def end(self) -> int:
        """How many of its tokens the slot has after the pass."""
        return self.kept + self.count


class PackedAttention:
    """Of one forward pass over a row [1, t] of segments, none padded, no mask between them needed.

    Everything but attention treats tokens one by one, so only here it matters whose they are. Keys and values of fresh
    tokens are written into the segment's slot, layer by layer; then its queries see what the slot holds up to them.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._masks: dict[int, Any] = {}

    def __call__(self, layer: int, query: Any, key: Any, value: Any, scale: float) -> Any:
        """[1, heads, t, d] each -> [1, t, heads, d]; keys and values may have fewer heads, each for several queries."""
        from torch.nn.functional import scaled_dot_product_attention

        seen = query.new_empty(query.shape)
        grouped = key.shape[1] != query.shape[1]
        for number, segment in enumerate(self._segments):
            rows = slice(segment.start, segment.start + segment.count)
            memory = segment.slot.memory[layer]
            memory[0, :, segment.kept : segment.end] = key[0, :, rows]
            memory[1, :, segment.kept : segment.end] = value[0, :, rows]
            seen[:, :, rows] = scaled_dot_product_attention(
                query[:, :, rows],
                memory[None, 0, :, : segment.end],
                memory[None, 1, :, : segment.end],
                attn_mask=self._mask(number, segment, query.device) if segment.count > 1 and segment.kept else None,
                is_causal=segment.count > 1 and not segment.kept,
                scale=scale,
                enable_gqa=grouped,
            )
        return seen.transpose(1, 2).contiguous()

    def _mask(self, number: int, segment: Segment, device: Any) -> Any:
        """Which of the slot's tokens each fresh one sees: all before it and itself. Bool [count, kept + count]."""
        import torch

        if number not in self._masks:
            own = torch.arange(segment.kept, segment.end, device=device)
            every = torch.arange(segment.end, device=device)
            self._masks[number] = every[None] <= own[:, None]
        return self._masks[number]


_running: ContextVar[PackedAttention | None] = ContextVar("ralmspec_packed", default=None)


@contextmanager
def attending(packed: PackedAttention) -> Iterator[None]:
    """Inside, passes of this thread through a network with `NAME` as its attention use `packed`."""
    before = _running.set(packed)
    try:
        yield
    finally:
        _running.reset(before)


def register() -> None:
    """Make it known to transformers as `NAME`. Outside of `attending` it is PyTorch's own, causal, over whole rows."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> tuple[Any, None]:
        if (packed := _running.get()) is not None:
            return packed(module.layer_idx, query, key, value, options["scaling"]), None
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register(NAME, attention)
