"""What the commands share on a terminal: consoles, progress, and an end in a sentence instead of a traceback."""

import contextlib
import os
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import anyio
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ralmspec.retrievers.errors import RalmspecError
from ralmspec.stages.stride import OS3, StrideSettings

from .engine import Engine, EngineOptions, choose_questions, open_engine

out = Console()
if not out.is_terminal:
    out.width = 120  # room for the tables in files and logs
err = Console(stderr=True)


def load(options: EngineOptions) -> Engine:
    """Open the engine, saying so."""
    return opened("loading model and index", lambda: open_engine(options))


def opened(what: str, opens: Callable[[], Engine]) -> Engine:
    """What `opens` opens, saying so; the tokenizer gets no threads beside ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with err.status(what):
        return opens()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run on uvloop where it is installed, and end as `ends_in_a_sentence` says."""
    try:
        import uvloop  # noqa: F401

        backend: dict[str, Any] = {"use_uvloop": True}
    except ImportError:
        backend = {}
    with ends_in_a_sentence():
        anyio.run(main, backend_options=backend)


@contextlib.contextmanager
def ends_in_a_sentence() -> Iterator[None]:
    """Errors that ralmspec raises on purpose become a sentence and exit code 2, Ctrl-C becomes 130."""
    try:
        yield
    except (RalmspecError, ValueError) as error:
        err.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err.print("interrupted")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; call what is yielded with the name of each piece of work as it begins."""
    columns = (
        TextColumn("{task.fields[what]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.description}"),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=total, what=what)

        def tell(text: str) -> None:
            begun = bar.tasks[0].description != ""
            bar.update(task, advance=1 if begun else 0, description=escape(text[:60]))

        yield tell


def stride(text: str) -> StrideSettings | int:
    """A speculation stride as typed: a number, or 'os3'."""
    return OS3() if text.strip().lower() == "os3" else number(text, "stride")


def number(text: str, what: str) -> int:
    """A whole number as typed; a usage error that names the option otherwise."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{what}: {text!r} is not a number") from None


def questions_as_typed(sets: str, count: int) -> Callable[[Engine], list[str]]:
    """The first `count` questions of each set, sets as typed."""
    return lambda engine: [question for _, question in questions_by_set(engine, sets, count)]


def questions_by_set(engine: Engine, sets: str, count: int) -> list[tuple[str, str]]:
    """The same, each with its set's name. Sets as typed: names with commas, or 'all' for those in the folder."""
    names = [name.strip() for name in sets.split(",")]
    if names == ["all"] and engine.questions is not None:
        names = engine.questions.sets()
    return [(name, question.question) for name, question in choose_questions(engine.questions, names, count)]
