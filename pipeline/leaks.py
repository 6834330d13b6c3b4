"""What a process holds: tasks, threads, descriptors, memory; and what is left of a run that should leave nothing."""

import os
import resource
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio import get_running_tasks

_DESCRIPTORS = Path("/proc/self/fd") if Path("/proc/self/fd").is_dir() else Path("/dev/fd")
_MEMORY = Path("/proc/self/statm")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Tasks of the running event loop, Python's threads, and open file descriptors: numbers, and what they are."""

    tasks: Mapping[int, str] = field(default_factory=dict)
    threads: Mapping[int, str] = field(default_factory=dict)
    descriptors: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def now(cls) -> "Footprint":
        """What there is at this moment."""
        numbers = [int(path.name) for path in _DESCRIPTORS.iterdir()] if _DESCRIPTORS.is_dir() else []
        return cls(
            {task.id: task.name or "?" for task in get_running_tasks()},
            {thread.ident or 0: thread.name for thread in threading.enumerate()},
            {number: _target(number) for number in numbers if _is_open(number)},  # not the one that listed them
        )

    def __sub__(self, before: "Footprint") -> "Footprint":
        """What was not there before."""

        def new(now: Mapping[int, str], then: Mapping[int, str]) -> dict[int, str]:
            return {number: name for number, name in now.items() if number not in then}

        return Footprint(
            new(self.tasks, before.tasks),
            new(self.threads, before.threads),
            new(self.descriptors, before.descriptors),
        )

    def __len__(self) -> int:
        return len(self.tasks) + len(self.threads) + len(self.descriptors)


async def left_behind(before: Footprint, patience_s: float = 2.0) -> Footprint:
    """What has come since and does not go within some seconds: threads take a moment to end."""
    with anyio.move_on_after(patience_s):
        while Footprint.now() - before:  # noqa: ASYNC110 (the end of a thread is announced nowhere)
            await anyio.sleep(0.02)
    return Footprint.now() - before


def resident_bytes() -> int:
    """Memory of this process that is in RAM; where the system does not tell, the most there ever was."""
    if _MEMORY.is_file():
        return int(_MEMORY.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _target(number: int) -> str:
    try:
        return os.readlink(_DESCRIPTORS / str(number))
    except OSError:
        return "?"
