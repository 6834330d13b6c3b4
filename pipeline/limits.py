"""The bounds of a pipeline."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a pipeline. Times in seconds."""

    sessions: int = 64
    """Sessions live at once; the model's KV memory may hold fewer. One more waits."""
    waiting: int = 64
    """Requests that wait for a slot or for KV memory; one more is refused with `Overloaded`. 0: nobody waits."""
    patience_s: float = math.inf
    """Who would wait for longer, by how long slots have been held lately, is refused at once. Until a slot has been
    freed, only `waiting` counts."""
    cached_documents: int = 4096
    """Documents a session's cache holds (LRU beyond)."""
    unread_events: int = 64
    """Events a caller may leave unread before its session pauses."""
    stall_s: float = 120.0
    """A session that could act and makes no progress for so long is failed with `Stalled`."""
    call_s: float = 300.0
    """A call into model, encoder or index that takes longer counts as hung: `EngineDead`."""
    drain_s: float = 30.0
    """How long leaving the pipeline lets live sessions go on; calls that still run then are waited for."""
    lag_alarm_s: float = 0.1
    """An event loop that does not turn for so long is logged, with the place where it is stuck. 0: no alarm."""

    def __post_init__(self) -> None:
        for name in ("sessions", "cached_documents", "unread_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"Limits({name}={getattr(self, name)}): must be at least 1")
        for name in ("patience_s", "stall_s", "call_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Limits({name}={getattr(self, name)}): must be above 0")
        for name in ("waiting", "drain_s", "lag_alarm_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Limits({name}={getattr(self, name)}): must not be below 0")
