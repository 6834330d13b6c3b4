"""The right answers of a stress run: RaLMSeq's, one for each prompt, and what an output differs from them by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ralmspec.stages.messages import Committed
from ralmspec.stages.sampling import Sampling
from ralmspec.stages.statistics import Statistics

from .arrangements import Sequential
from .audit import Difference, differ
from .engine import Engine
from .pipeline import Pipeline
from .simulated import SimulatedModel, direct_answer
from .stream import Answer


@dataclass(frozen=True, slots=True)
class Mismatch:
    """An output, or the part of one that was committed before its end, that is not what it should be."""

    prompt: int
    expected: Answer
    found: Answer


@dataclass(frozen=True, slots=True)
class Oracle:
    """An answer for each prompt, as long as any session may ask for.

    A token does not depend on how many are still to come, so a shorter answer is the beginning of the longer one.
    """

    prompts: Sequence[str]
    answers: Sequence[Answer]
    sampling: Sampling

    def mismatch(self, prompt: int, steps: Sequence[Committed], limit: int | None) -> Mismatch | None:
        """What is wrong with these steps, in tokens or documents.

        A complete output must be the answer's first `limit` tokens, or all of it, if it is shorter. One that was cut
        short (`limit` None) must be the answer's beginning.
        """
        tokens = tuple(token for step in steps for token in step.tokens)
        expected = _beginning(self.answers[prompt], len(tokens) if limit is None else limit)
        documents = [step.document.id for step in expected.steps]
        if tokens == expected.tokens and [step.document.id for step in steps] == documents:
            return None
        return Mismatch(prompt, expected, Answer("", tokens, tuple(steps), Statistics()))

    def audit(self, engine: Engine, mismatch: Mismatch) -> Difference:
        """Whether a near-tie explains it, as `verify-lossless` would say. Blocking: runs the model."""
        difference = differ(
            mismatch.expected,
            mismatch.found,
            prompt=self.prompts[mismatch.prompt],
            model=engine.model,
            retriever=engine.index,
            workload=engine.workload.bind(engine.model, engine.index),
            sampling=self.sampling,
            dtype=engine.options.dtype,
        )
        assert difference is not None, "a mismatch is a difference"
        return difference


def _beginning(answer: Answer, tokens: int) -> Answer:
    """The first tokens, and the steps they belong to; the last of these may have lost some of its own."""
    steps, left = [], tokens
    for step in answer.steps:
        if left > 0:
            steps.append(replace(step, tokens=step.tokens[:left]))
            left -= len(step.tokens)
    return Answer("", answer.tokens[:tokens], tuple(steps), answer.statistics)


async def right_answers(
    engine: Engine,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    progress: Callable[[str], None] = lambda text: None,
) -> Oracle:
    """The answers to all prompts, one after the other.

    Of a simulated engine they are worked out by a plain loop, which shares nothing with pipeline and stages but what a
    workload says; a real engine answers as RaLMSeq, alone.
    """
    answers = []
    if isinstance(engine.model, SimulatedModel):
        for prompt in prompts:
            progress(prompt)
            answers.append(direct_answer(prompt, engine.workload, max_new_tokens=max_new_tokens, sampling=sampling))
        return Oracle(prompts, answers, sampling)
    async with Pipeline(
        model=engine.model,
        retriever=engine.index,
        workload=engine.workload,
        speculation=Sequential(),
        limits=engine.limits,
    ) as pipeline:
        for prompt in prompts:
            progress(prompt)
            answers.append(await pipeline.complete(prompt, max_new_tokens=max_new_tokens, sampling=sampling))
    return Oracle(prompts, answers, sampling)
