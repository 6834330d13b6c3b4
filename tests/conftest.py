"""What every test stands on: `ralmspec` can be imported, and nothing of it is left running afterwards."""

import signal
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

if find_spec("ralmspec") is None:  # straight after a clone, before anything was installed
    namespace = ModuleType("ralmspec")
    namespace.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["ralmspec"] = namespace

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # shells start jobs in the background so; their children inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_thread_left_running() -> Iterator[None]:
    """A pipeline that was left has no threads any more; they may take a moment to end."""
    before = set(threading.enumerate())
    yield
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("ralmspec-")]
    left = [thread for thread in threads if thread not in before]
    for thread in left:
        thread.join(1)
    assert not [thread.name for thread in left if thread.is_alive()], "threads were left running"
