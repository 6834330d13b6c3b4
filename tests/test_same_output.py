"""Every arrangement gives, token for token, what a plain sequential loop gives."""

from typing import Any

import pytest
from clocks import VirtualLoop
from fakes import AlwaysMisses, Certifying, FakeModel, FakeRetriever, fixed
from oracle import sequential

from ralmspec.pipeline import (
    OS3,
    Adaptive,
    Asynchronous,
    Continuous,
    InContext,
    Pipeline,
    Sampling,
    Sequential,
    Speculation,
    Synchronous,
)

STRIDES: list[int | OS3] = [1, 3, 8, OS3()]
ARRANGEMENTS: dict[str, Speculation] = {
    "sequential": Sequential(),
    **{
        f"{kind.__name__.lower()} s={stride if isinstance(stride, int) else 'OS3'} P={prefetch}": kind(
            speculation_stride=stride, prefetch=prefetch
        )
        for kind in (Synchronous, Asynchronous)
        for stride in STRIDES
        for prefetch in (1, 20, 256)
    },
    "synchronous s=4 token check": Synchronous(speculation_stride=4, token_check=True),
    "synchronous s=3 certified skip": Synchronous(speculation_stride=3, certified_skip=True),
    "asynchronous s=OS3 token check": Asynchronous(token_check=True),
    "continuous": Continuous(),
    "continuous, 3 flights, P=1": Continuous(flights=3, prefetch=1),
    "continuous, no token check": Continuous(token_check=False),
    "continuous, no certified skip": Continuous(certified_skip=False),
    "adaptive": Adaptive(),
}
RETRIEVERS: dict[str, Any] = {
    "ordinary": lambda seed: FakeRetriever(documents=300, dimension=8, seed=seed, spread=5),
    "knows a bound": lambda seed: Certifying(documents=60, dimension=8, seed=seed, spread=5),
    "always hits": lambda seed: FakeRetriever(documents=1, seed=seed),
    "always misses": lambda seed: AlwaysMisses(),
    "all tie": lambda seed: FakeRetriever(documents=9, seed=seed, spread=1),
    "duplicates": lambda seed: FakeRetriever(documents=64, dimension=2, seed=seed, spread=2),
}


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
@pytest.mark.parametrize("kind", RETRIEVERS)
async def test_same_tokens_and_documents(arrangement: Speculation, kind: str) -> None:
    for seed in range(4):
        model = FakeModel(seed=seed, stubborn=(0.0, 0.5, 0.9, 1.0)[seed], ends=seed % 2 == 0)
        retriever = RETRIEVERS[kind](seed)
        sampling = Sampling(temperature=0.7, seed=seed) if seed > 1 else Sampling()
        settings = InContext(retrieval_stride=(4, 1, 3, 4)[seed])
        workers = fixed(model=0.1, index=(0.0, 0.05, 0.3, 2.0)[seed], encoder=0.01, prefetch=0.02)
        async with Pipeline(
            model=model, retriever=retriever, workload=settings, speculation=arrangement, worker=workers
        ) as pipeline:
            for prompt in ("3 1 4", "15 9 2 6", "5 3 5 8 9 7 9"):
                answer = await pipeline.complete(prompt, max_new_tokens=37, sampling=sampling)
                tokens, documents = sequential(
                    model,
                    retriever,
                    model.encode(prompt),
                    max_new_tokens=37,
                    retrieval_stride=settings.retrieval_stride,
                    sampling=sampling,
                )
                assert list(answer.tokens) == tokens
                assert [step.document.id for step in answer.steps] == documents
                assert answer.text == model.decode(tokens)
            assert pipeline.live_sessions == 0
