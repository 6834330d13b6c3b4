"""Runs arrangements against RaLMSeq and keeps account of every output that is not the same."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from ralmspec.stages.sampling import Sampling

from .arrangements import Sequential
from .audit import TOLERANCE, differ
from .engine import Engine
from .pipeline import Pipeline
from .reports import Case, Losslessness
from .speculation import Speculation


@dataclass(slots=True)
class Tally:
    """Outputs compared so far."""

    arrangements: list[str]
    outputs: int = 0
    identical: int = 0
    cases: list[Case] = field(default_factory=list)

    @property
    def explained(self) -> int:
        """Differences that start at a near-tie."""
        return sum(case.explained for case in self.cases)

    def report(self, environment: dict[str, Any]) -> Losslessness:
        """The stable JSON contract."""
        return Losslessness(
            environment=environment,
            outputs=self.outputs,
            identical=self.identical,
            explained=self.explained,
            arrangements=self.arrangements,
            cases=self.cases,
        )


async def verify(
    engine: Engine,
    prompts: Sequence[str],
    arrangements: Mapping[str, Speculation],
    tally: Tally,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve every prompt with RaLMSeq and with every arrangement; what differs becomes a case."""
    workload = engine.workload
    bound = workload.bind(engine.model, engine.retriever)

    def pipeline(arrangement: Speculation) -> Pipeline:
        return Pipeline(
            model=engine.model,
            retriever=engine.retriever,
            drafter=engine.drafter,
            workload=workload,
            speculation=arrangement,
            limits=engine.limits,
        )

    async with AsyncExitStack() as stack:
        sequential = await stack.enter_async_context(pipeline(Sequential()))
        others = {n: await stack.enter_async_context(pipeline(a)) for n, a in arrangements.items()}
        for prompt in prompts:
            progress(f"RaLMSeq: {prompt}")
            reference = await sequential.complete(prompt, max_new_tokens=max_new_tokens, sampling=sampling)
            for name, other in others.items():
                progress(f"{name}: {prompt}")
                answer = await other.complete(prompt, max_new_tokens=max_new_tokens, sampling=sampling)
                difference = differ(
                    reference,
                    answer,
                    prompt=prompt,
                    model=engine.model,
                    retriever=engine.index,
                    workload=bound,
                    sampling=sampling,
                    dtype=engine.options.dtype,
                )
                tally.outputs += 1
                if difference is None:
                    tally.identical += 1
                    continue
                tally.cases.append(
                    Case(
                        question=prompt,
                        arrangement=name,
                        position=difference.position,
                        gap=difference.gap,
                        tolerance=TOLERANCE.get(engine.options.dtype, 0.0),
                        explained=difference.explained,
                    )
                )
