"""The fault list, F12 and F18: a process that is told to end, or whose engine dies. See `test_faults_list.py`."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SERVICE = """
import sys, threading, time
sys.path[:0] = [{tests!r}, {examples!r}]
import anyio
import serve_until_sigterm as service
from fakes import FakeModel, FakeRetriever
from ralmspec.pipeline import Limits, Pipeline

class Panic(BaseException):
    pass

class Paced(FakeModel):
    max_batch = 64
    def forward(self, prefixes):
        time.sleep(0.01)
        if self.passes == {dies_after}:
            raise Panic("a native library has given up")
        return super().forward(prefixes)

service.QUESTIONS = ("3 1 4", "2 7 1 8", "5 3 5", "1 1")
pipeline = Pipeline(model=Paced(ends=False), retriever=FakeRetriever(), limits=Limits(drain_s={drain_s}))
ends = anyio.run(service.serve, pipeline, {clients}, {length})
print(dict(ends), flush=True)
"""


class Service:
    """The example as a process of its own over fakes, about 100 tokens a second for each client."""

    def __init__(self, *, clients: int, length: int, drain_s: float, dies_after: int = -1) -> None:
        program = SERVICE.format(
            tests=str(Path(__file__).parent),
            examples=str(EXAMPLES),
            clients=clients,
            length=length,
            drain_s=drain_s,
            dies_after=dies_after,
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []

    def read_to(self, text: str, times: int = 1) -> None:
        assert self.process.stdout is not None
        while times:
            line = self.process.stdout.readline()
            assert line, f"it ended before it said {text!r}: {self.lines} {self.process.communicate()}"
            self.lines.append(line.strip())
            times -= text in line

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def left(self) -> tuple[int, str]:
        """Its exit code, and what it said to the end."""
        try:
            out, self.error = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode, "\n".join([*self.lines, out])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_f18_sigterm_while_idle(number: int) -> None:
    service = Service(clients=0, length=1, drain_s=30)
    service.read_to("serving")
    began = time.monotonic()
    service.signal(number)
    code, said = service.left()
    assert (code, service.error) == (0, "") and time.monotonic() - began < 1
    assert "draining 0 sessions" in said and "sessions left: 0" in said


@pytest.mark.parametrize("length", [40, 2000], ids=["that may end", "that may not"])
def test_f18_sigterm_under_load(length: int) -> None:
    """What can end in time ends with `Done`, the rest with an error; nothing is truncated, and it takes D and a bit."""
    service = Service(clients=8, length=length, drain_s=1.5)
    service.read_to("serving")
    if length == 40:
        service.read_to("done", times=8)
    began = time.monotonic()
    service.signal(signal.SIGTERM)
    code, said = service.left()
    assert (code, service.error) == (0, ""), service.error
    assert time.monotonic() - began < 1.5 + 1
    after = said[said.index("draining") :]
    assert "TRUNCATED" not in said and "sessions left: 0" in after
    assert after.count("done after 40 tokens") >= (length == 40)
    assert sum(f"client {n}: NotServing" in after for n in range(8)) == 8


def test_f18_sigterm_twice_leaves_at_once() -> None:
    """Long before draining would be over; every stream is told."""
    service = Service(clients=8, length=2000, drain_s=30)
    service.read_to("serving")
    service.signal(signal.SIGTERM)
    service.read_to("draining")
    began = time.monotonic()
    service.signal(signal.SIGTERM)
    code, said = service.left()
    assert (code, service.error) == (0, ""), service.error
    assert time.monotonic() - began < 1
    assert said.count("NotServing after") == 8 and "TRUNCATED" not in said and "sessions left: 0" in said


def test_f12_a_process_whose_engine_has_died_fails() -> None:
    service = Service(clients=8, length=2000, drain_s=30, dies_after=20)
    began = time.monotonic()
    code, said = service.left()
    assert code not in (0, None) and said.count("EngineDead after") == 8 and "TRUNCATED" not in said
    assert time.monotonic() - began < 30
