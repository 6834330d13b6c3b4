"""What serving one session took: counts, seconds, and what was cut."""

import math
from dataclasses import dataclass, fields, replace


@dataclass(slots=True, kw_only=True)
class Statistics:
    """Kept by the session while it runs; the `Done` event carries a copy. All times in seconds."""

    prompt_tokens: int = 0
    prompt_tokens_cut: int = 0
    """Prompt tokens dropped on the left because the prompt was longer than the workload allows."""
    documents_cut: int = 0
    """Committed steps whose document was shortened to fit."""
    new_tokens: int = 0
    steps: int = 0
    kb_calls: int = 0
    """Searches of the knowledge base that this session took part in, one for each batch of its checks."""
    kb_queries: int = 0
    checked: int = 0
    """Guesses that the knowledge base has judged."""
    matched: int = 0
    """Those of them that named the true documents, or, where the verdict compares tokens, led to the true one."""
    matched_by_drafter: int = 0
    """Those of them whose first document the drafter named, and the cache did not have; the others are cache hits."""
    certified: int = 0
    """Steps whose guess was proven by an earlier search, so that it was not checked."""
    saved: int = 0
    """Steps written under other documents than the true ones, whose tokens stood all the same (`token_check`)."""
    rollbacks: int = 0
    wasted_tokens: int = 0
    """Tokens decoded and then thrown away by a rollback."""
    search_s: float = 0.0
    """Time inside those searches, judging what they found included."""
    shortest_search_s: float = math.inf
    """The shortest of them: about what a search of one query takes, if any was of one."""
    busy_s: float = 0.0
    """Time in Lookup and Generate, waiting for their turn included."""
    time_to_first_token_s: float | None = None
    """From admission to the first committed token."""
    latency_s: float = 0.0
    """From admission to the end."""
    reader_s: float = 0.0
    """Of that, while the caller had so much left unread that nothing new was begun for it."""

    def since(self, earlier: "Statistics") -> "Statistics":
        """What has been added to these since they were `earlier`; what is no sum stays as it is."""
        sums = (field.name for field in fields(self) if field.name not in _NO_SUMS)
        return replace(self, **{name: getattr(self, name) - getattr(earlier, name) for name in sums})

    @property
    def gamma(self) -> float | None:
        """Share of guesses, judged or proven, that were right (the paper's γ, measured; OS3's counts the judged alone);
        None before the first."""
        known = self.checked + self.certified
        return (self.matched + self.certified) / known if known else None


_NO_SUMS = {"prompt_tokens", "prompt_tokens_cut", "shortest_search_s", "time_to_first_token_s"}
