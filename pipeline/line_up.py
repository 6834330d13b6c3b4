"""Arrangements by the names that tables and `--only` know them by."""

from dataclasses import replace

from ralmspec.stages.arrangement import Arrangement
from ralmspec.stages.stride import OS3, StrideSettings

from .adaptive import Adaptive
from .arrangements import Asynchronous, Continuous, Sequential, Synchronous
from .speculation import Speculation

MAIN_TABLE = ("RaLMSeq", "RaLMSpec", "+P", "+S", "+A", "+PSA")
"""Those of the paper's main table; the others stand in its ablation."""


def published(prefetch: int = 20) -> dict[str, Arrangement]:
    """The arrangements of the paper's tables under the paper's names, RaLMSeq first; fixed strides are 3.

    P: prefetch, S: the stride scheduler OS3, A: asynchronous verification.
    """

    def made(*, p: bool = False, s: bool = False, a: bool = False) -> Arrangement:
        kind = Asynchronous if a else Synchronous
        return kind(speculation_stride=OS3() if s else 3, prefetch=prefetch if p else 1, asks_drafter=False)

    return {
        "RaLMSeq": Sequential(),
        "RaLMSpec": made(),
        "+P": made(p=True),
        "+S": made(s=True),
        "+A": made(a=True),
        "+PS": made(p=True, s=True),
        "+SA": made(s=True, a=True),
        "+PA": made(p=True, a=True),
        "+PSA": made(p=True, s=True, a=True),
    }


def beyond(prefetch: int = 256) -> dict[str, Speculation]:
    """What goes beyond the paper: all of it together, what chooses by itself, each part added to +PSA, all but each.

    T: token check, D: drafter, W: wide prefetch, N: decoding never waits, C: certified skip.
    """
    psa = Asynchronous(asks_drafter=False)
    every = Continuous(prefetch=prefetch)
    return {
        "adaptive": Adaptive(prefetch=prefetch),
        "continuous": every,
        "+PSA+T": replace(psa, token_check=True),
        "+PSA+D": replace(psa, asks_drafter=True),
        "+PSA+W": replace(psa, prefetch=prefetch),
        "+PSA+N": Continuous(token_check=False, asks_drafter=False, certified_skip=False),
        "+PSA+C": replace(psa, certified_skip=True),
        "continuous-T": replace(every, token_check=False),
        "continuous-D": replace(every, asks_drafter=False),
        "continuous-W": replace(every, prefetch=psa.prefetch),
        "continuous-N": Asynchronous(prefetch=prefetch, token_check=True, certified_skip=True),
        "continuous-C": replace(every, certified_skip=False),
    }


def by_stride(prefetch: int = 20, flights: int = 1) -> dict[str, Speculation]:
    """RaLMSeq, the strides of the paper's figure for KNN-LM and the scheduler, each also with asynchronous
    verification, `Continuous`, and `Adaptive`."""
    strides: dict[str, StrideSettings | int] = {"s=1": 1, "s=2": 2, "s=4": 4, "s=8": 8, "OS3": OS3()}

    def made(kind: type[Synchronous], stride: StrideSettings | int) -> Arrangement:
        return kind(speculation_stride=stride, prefetch=prefetch, asks_drafter=False)

    return {
        "RaLMSeq": Sequential(),
        **{name: made(Synchronous, stride) for name, stride in strides.items()},
        **{f"{name} +A": made(Asynchronous, stride) for name, stride in strides.items()},
        "continuous": Continuous(prefetch=prefetch, flights=flights),
        "adaptive": Adaptive(prefetch=prefetch),
    }
