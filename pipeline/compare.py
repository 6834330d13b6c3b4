"""Runs arrangements on the same questions, paired and interleaved, and states what came of it.

a is one step of RaLMSeq on the same engine without its search, b one search of one query; both are measured in the same
run, per question. T_decode = n·a. T* = b + n·a + R·b + max(0, b − a): the first retrieval, all decoding, R real misses
that each expose one retrieval, and the last verification that nothing is left to hide.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ralmspec.stages.sampling import Sampling
from ralmspec.stages.statistics import Statistics

from .audit import Difference, differ
from .engine import Engine
from .pipeline import Pipeline
from .reports import Comparison, Row, environment
from .speculation import Speculation
from .stream import Answer

BASELINE = "RaLMSeq"


@dataclass(slots=True)
class Runs:
    """All that was measured so far: per arrangement, one answer a question."""

    arrangements: Mapping[str, Speculation]
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    differences: dict[str, list[Difference | None]] = field(default_factory=dict)

    @property
    def complete(self) -> int:
        """Questions that every arrangement has answered."""
        return min((len(self.differences.get(name, [])) for name in self.arrangements), default=0)


async def run(
    engine: Engine,
    prompts: Sequence[str],
    runs: Runs,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    trace: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> None:
    """Fill `runs`, prompt by prompt; what is there stays there if this is cancelled.

    Every prompt is served by every arrangement before the next; the order is reversed for every other prompt, so
    that drift of the machine hits all alike. One prompt is served unmeasured first. Outputs have equal length.
    """
    workload = engine.workload
    bound = workload.bind(engine.model, engine.retriever)
    pipelines = {
        name: Pipeline(
            model=engine.model,
            retriever=engine.retriever,
            drafter=engine.drafter,
            workload=workload,
            speculation=arrangement,
            limits=engine.limits,
        )
        for name, arrangement in runs.arrangements.items()
    }

    async def serve(name: str, prompt: str, tokens: int = max_new_tokens) -> Answer:
        async with pipelines[name] as pipeline:
            return await pipeline.complete(
                prompt, max_new_tokens=tokens, sampling=sampling, ignore_eos=True, trace=trace
            )

    progress("warming up")
    for name in pipelines:
        await serve(name, prompts[0], min(max_new_tokens, 4 * bound.retrieval_stride))
    for number, prompt in enumerate(prompts):
        answers = {}
        for name in list(pipelines)[:: 1 if number % 2 == 0 else -1]:
            progress(f"{name}: {prompt}")
            answers[name] = await serve(name, prompt)
        reference = answers[BASELINE]
        for name, answer in answers.items():
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
            runs.answers.setdefault(name, []).append(answer)
            runs.differences.setdefault(name, []).append(difference)


def rows(runs: Runs, retriever: str) -> list[Row]:
    """The table: one row an arrangement, over the questions that all have answered."""
    n = runs.complete
    baseline = [answer.statistics for answer in runs.answers[BASELINE][:n]]
    return [row(name, baseline, runs.answers[name][:n], runs.differences[name][:n], retriever) for name in runs.answers]


def report(runs: Runs, engine: Engine, **facts: Any) -> Comparison:
    """The stable JSON contract: the table, and beside it all that it was measured on; `facts` are added to that."""
    a, b = step_and_search([answer.statistics for answer in runs.answers[BASELINE][: runs.complete]])
    measured = {
        "questions": runs.complete,
        "retriever": engine.description,
        "simulated_latency_s": engine.options.retriever_latency or None,
        "a_s": float(a.mean()),
        "b_s": float(b.mean()),
        "b_over_a": float(b.mean() / a.mean()),
    }
    facts = engine.options.facts() | facts | measured
    return Comparison(environment=environment(**facts), rows=rows(runs, engine.description))


def row(
    name: str,
    baseline: Sequence[Statistics],
    answers: Sequence[Answer],
    differences: Sequence[Difference | None],
    retriever: str,
) -> Row:
    """One arrangement against the baseline of the same questions."""
    mine = [answer.statistics for answer in answers]
    latency = np.array([s.latency_s for s in mine])
    reference = np.array([s.latency_s for s in baseline])
    steps = np.array([s.steps for s in baseline])
    a, b = step_and_search(baseline)
    guessed = sum(s.checked + s.certified for s in mine)
    misses = np.array([s.rollbacks for s in mine]) if guessed else steps - 1
    drain = np.maximum(0.0, b - a) if guessed else 0.0
    best = b + steps * a + misses * b + drain
    draws = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
    ratios = reference[draws].sum(axis=1) / latency[draws].sum(axis=1)
    return Row(
        arrangement=name,
        retriever=retriever,
        speedup=float(reference.sum() / latency.sum()),
        speedup_low=float(np.quantile(ratios, 0.025)),
        speedup_high=float(np.quantile(ratios, 0.975)),
        latency_s=float(latency.mean()),
        time_to_first_token_s=float(np.mean([s.time_to_first_token_s or 0.0 for s in mine])),
        f_ideal=float((steps * a).sum() / latency.sum()),
        f_miss=float(best.sum() / latency.sum()),
        gamma=sum(s.matched + s.certified for s in mine) / guessed if guessed else None,
        cache_hits=sum(s.matched - s.matched_by_drafter for s in mine),
        drafter_hits=sum(s.matched_by_drafter for s in mine),
        certified=sum(s.certified for s in mine),
        saved=sum(s.saved for s in mine),
        rollbacks=sum(s.rollbacks for s in mine),
        kb_calls=sum(s.kb_calls for s in mine),
        kb_queries=sum(s.kb_queries for s in mine),
        wasted_tokens=sum(s.wasted_tokens for s in mine),
        identical=sum(d is None for d in differences),
        explained=sum(d is not None and d.explained for d in differences),
        outputs=len(answers),
    )


def step_and_search(
    baseline: Sequence[Statistics],
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """a and b of each question, in seconds, from RaLMSeq's own run."""
    a = np.array([(s.latency_s - s.search_s) / s.steps for s in baseline])
    b = np.array([s.search_s / s.kb_calls for s in baseline])
    return a, b
