"""Does it pay to gather checks, so that they share a search, where decoding never waits for them?

    python benchmarks/launch_threshold.py
    python benchmarks/launch_threshold.py --data DIR --pad-to 2000000 --questions 2 --sets nq,triviaqa --out launch.json

A batch of searches costs less than as many single ones, which counts where index and model share cores. But a check
that waits finds a wrong guess later, and what it brings comes later into the cache from which the next guesses are
made. Rows: `continuous`, which sends out what there is whenever nothing flies; the same, but waiting for n checks; and
synchronous strides of n. No row has certified skips.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import anyio
import typer
from rich.console import Console

from ralmspec.pipeline import Continuous, Sampling, Sequential, Speculation, Synchronous
from ralmspec.pipeline.compare import Runs, report, run
from ralmspec.pipeline.engine import EngineOptions, choose_questions, open_engine
from ralmspec.pipeline.overlap import overlap_efficiency
from ralmspec.pipeline.tables import comparison_table
from ralmspec.stages.arrangement import Outlook
from ralmspec.stages.stride import FixedStride

DEMO = Path(__file__).parent.parent / "examples" / "demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """Decodes on as `Continuous` does; checks leave when there are so many of them, or nothing else can be done."""

    checks: int
    prefetch: int = 256
    window = 64
    flights = 1
    guesses = True
    asks_drafter = True
    token_check = True
    certified_skip = False

    def stride(self) -> FixedStride:
        """The number of checks."""
        return FixedStride(self.checks)

    def may_draft(self, outlook: Outlook) -> bool:
        """Always."""
        return True

    def checks_due(self, outlook: Outlook) -> bool:
        """When enough wait."""
        return outlook.stuck or outlook.queued >= outlook.stride


def main(
    data: Annotated[Path, typer.Option(help="Folder with passages, embeddings and questions.")] = DEMO,
    model: Annotated[str, typer.Option(help="Model folder or hub id.")] = str(DEMO / "model"),
    pad_to: Annotated[int, typer.Option(help="Pad the corpus to so many vectors; 0: as it is.")] = 0,
    thresholds: Annotated[str, typer.Option(help="Checks that a search waits for, with commas.")] = "2,4,8,16",
    questions: Annotated[int, typer.Option(min=1, help="Questions from each set.")] = 1,
    sets: Annotated[str, typer.Option(help="Question sets, with commas.")] = "nq",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 48,
    out: Annotated[Path | None, typer.Option(help="Also write the result as JSON to this file.")] = None,
) -> None:
    """Serve questions with and without gathering checks, paired and interleaved."""
    engine = open_engine(EngineOptions(model=model, data=data, pad_to=pad_to))
    numbers = [int(number) for number in thresholds.split(",")]
    rows: dict[str, Speculation] = {
        "RaLMSeq": Sequential(),
        "continuous": Continuous(prefetch=256, certified_skip=False),
        **{f"gathers {n}": Gathering(checks=n) for n in numbers},
        **{f"s={n}": Synchronous(speculation_stride=n, prefetch=256, token_check=True) for n in numbers},
    }
    runs, overlap = Runs(rows), overlap_efficiency(engine)
    chosen = [question.question for _, question in choose_questions(engine.questions, sets.split(","), questions)]
    anyio.run(lambda: run(engine, chosen, runs, max_new_tokens=max_new_tokens, sampling=Sampling()))
    made = report(runs, engine, sets=sets, max_new_tokens=max_new_tokens, overlap=overlap)
    Console(width=150).print(comparison_table(made))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(made.model_dump_json(indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
