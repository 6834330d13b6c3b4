"""`ralmspec ask`: one question, its answer as it is committed."""

from collections.abc import Callable
from typing import Annotated

import typer
from rich.live import Live
from rich.markup import escape

from ralmspec.stages.messages import Committed
from ralmspec.stages.sampling import Sampling

from .arrangements import Asynchronous, Sequential, Synchronous
from .engine import Engine, EngineOptions
from .options import NewTokensOption, SeedOption, TemperatureOption, with_options
from .pipeline import Pipeline
from .speculation import Speculation
from .terminal import err, load, out, run
from .terminal import stride as as_stride
from .transcript import Transcript


@with_options(EngineOptions)
def ask(
    engine_options: EngineOptions,
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    max_new_tokens: NewTokensOption = 128,
    stride: Annotated[str, typer.Option(help="Speculation stride: a number, or 'os3' for the scheduler.")] = "os3",
    prefetch: Annotated[int, typer.Option(min=1, help="Documents that every search brings.")] = 20,
    asynchronous: Annotated[bool, typer.Option("--async/--sync", help="Verify beside decoding, or between.")] = True,
    sequential: Annotated[bool, typer.Option("--sequential", help="Do not speculate at all.")] = False,
    drafts: Annotated[
        bool, typer.Option("--drafts", help="On a terminal, also show drafts (dim) and what is retracted (struck out).")
    ] = False,
    sources: Annotated[bool, typer.Option("--sources", help="List the documents at the end.")] = False,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
) -> None:
    """Answer one question, streaming verified text as it is committed."""
    kind = Asynchronous if asynchronous else Synchronous
    arrangement = Sequential() if sequential else kind(speculation_stride=as_stride(stride), prefetch=prefetch)

    sampling = Sampling(temperature=temperature, seed=seed)
    answered(
        lambda: load(engine_options),
        question,
        arrangement,
        sampling,
        max_new_tokens=max_new_tokens,
        drafts=drafts,
        sources=sources,
    )


def answered(
    opens: Callable[[], Engine],
    prompt: str,
    arrangement: Speculation,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    drafts: bool,
    sources: bool,
) -> None:
    """Open an engine, answer one prompt, and show the text as it comes."""

    async def main() -> None:
        engine = opens()
        pipeline = Pipeline(
            model=engine.model,
            retriever=engine.retriever,
            drafter=engine.drafter,
            workload=engine.workload,
            speculation=arrangement,
            limits=engine.limits,
        )
        transcript = Transcript()
        async with (
            pipeline,
            pipeline.session(prompt, max_new_tokens=max_new_tokens, sampling=sampling, drafts=drafts) as session,
        ):
            if drafts and out.is_terminal:
                with Live(transcript, console=out, auto_refresh=False, vertical_overflow="visible") as live:
                    async for event in session:
                        transcript.show(event)
                        live.update(transcript, refresh=True)
            else:  # what is committed is never taken back, so it can go to a file or another program at once
                async for event in session:
                    transcript.show(event)
                    if isinstance(event, Committed):
                        out.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
                out.print()
        s = session.statistics
        out.print(
            f"[dim]{s.new_tokens} tokens in {s.latency_s:.2f} s (first after {s.time_to_first_token_s or 0:.2f} s), "
            f"{s.steps} retrievals in {s.kb_calls} searches, {s.rollbacks} rollbacks; {engine.description}[/dim]",
            highlight=False,
            soft_wrap=True,
        )
        if s.prompt_tokens_cut:
            err.print(f"[yellow]the prompt was too long: {s.prompt_tokens_cut} tokens were cut on the left[/yellow]")
        if sources:
            for document in transcript.documents.values():
                out.print(f"  \\[{document.id}] {escape(document.title)}  {document.score:.3f}", highlight=False)

    run(main)
