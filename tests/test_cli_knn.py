"""The commands around datastores: build one with the bundled model, look into it, and what goes wrong."""

import contextlib
import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import DEMO, run

from ralmspec.pipeline import command_knn
from ralmspec.pipeline.build_view import building
from ralmspec.retrievers.datastore import Datastore

pytest.importorskip("torch", reason="needs ralmspec[local]")
pytest.importorskip("faiss", reason="needs ralmspec[local]")

MODEL = ["--model", str(DEMO / "model")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real sentences, gzipped; the model makes some 2,000 tokens of them."""
    path = tmp_path_factory.mktemp("cli") / "text.txt.gz"
    with gzip.open(DEMO / "passages_wikipedia.jsonl.gz", "rt") as lines, gzip.open(path, "wt") as copy:
        copy.writelines(json.loads(line)["text"] + "\n" for _, line in zip(range(12), lines, strict=False))
    return path


@pytest.fixture(scope="module")
def store(text: Path) -> Path:
    folder = text.with_name("store")
    code, out, err = run(
        "knn", "build", str(text), str(text), str(folder), *MODEL, "--kinds", "exact,hnsw,ivf", "--storage", "float32",
        "--window", "128", "--context", "32", "--batch", "4", "--max-entries", "1000", "--hnsw-m", "8",
        "--hnsw-ef-construction", "40", "--ivf-lists", "8", "--seed", "3",
    )  # fmt: skip
    assert code == 0, err
    told = " ".join(out.replace("│", " ").split())
    assert "1,000 entries" in told and "storage float32, window 128, context 32, batch 4" in told
    return folder


def test_what_was_asked_for_is_built(store: Path, text: Path) -> None:
    opened = Datastore.open(store)
    assert (len(opened), opened.dimension, opened.keys.kind) == (1000, 256, "float32")
    assert opened.manifest.parts["tokens"]["texts"] == [text.name, text.name]
    assert opened.manifest.parts["hnsw"] == {"m": 8, "ef_construction": 40, "seed": 3}
    assert opened.manifest.parts["ivf"] == {"lists": 8, "seed": 3}
    for kind in ("exact", "hnsw", "ivf"):
        assert len(opened.retriever(kind)) == 1000


def test_info_tells_checks_and_names_what_is_wrong(store: Path) -> None:
    code, out, _ = run("knn", "info", str(store), "--check")
    assert code == 0 and "every file is the one that was built" in out and "m 8" in out
    code, out, _ = run("knn", "info", str(store), "--json")
    written = json.loads(out)
    assert code == 0 and (written["documents"], written["content"], written["metric"]) == (
        1000,
        "datastore",
        "squared L2",
    )
    keys = store / "keys" / "keys.npy"
    content = keys.read_bytes()
    keys.write_bytes(content[:-1])
    code, _, err = run("knn", "info", str(store), "--check")
    assert code == 2 and "keys.npy" in err.replace("\n", "")
    keys.write_bytes(content)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["knn", "build", "nowhere.txt", "x", *MODEL], "nowhere.txt: there is no such file"),
        (["knn", "build", "{empty}", "{new}", *MODEL], "the file is empty"),
        (["knn", "build", "{text}", "{store}", *MODEL], "exists already"),
        (["knn", "build", "{text}", "x", *MODEL, "--kinds", "bm25"], "a datastore can have exact, hnsw, ivf"),
        (["knn", "build", "{text}", "x", *MODEL, "--window", "64", "--context", "64"], "cannot keep 64 of them"),
        (["knn", "build", "{text}", "x", *MODEL, "--window", "4096"], "takes at most 2048"),
        (["knn", "build", "{text}", "x", "--model", "{store}"], "holds no config.json"),
        (["knn", "build", "{text}", "x", *MODEL, "--device", "cuda:77"], "'cuda:77' is not there"),
        (["knn", "build", "{text}", *MODEL], "Missing argument"),
        (["knn", "info", "nowhere"], "no datastore of KNN-LM; make one with `ralmspec knn build`"),
        (["index", "info", "{store}"], "is a datastore of KNN-LM, not an index folder"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    store: Path, text: Path, tmp_path: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    places = {"store": store, "text": text, "empty": tmp_path / "empty.txt", "new": tmp_path / "new"}
    code, _, err = run(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert says in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.building").exists()


def test_an_interrupted_build_says_how_to_go_on(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0

    @contextlib.contextmanager
    def interrupting(content):  # type: ignore[no-untyped-def]
        def tell(part: str, done: int, total: int) -> None:
            nonlocal passes
            passes += part == "keys"
            if passes == 2:
                signal.raise_signal(signal.SIGINT)
            told(part, done, total)

        with building(content) as told:
            yield tell

    folder = tmp_path / "store"
    arguments = [
        "knn",
        "build",
        str(text),
        str(folder),
        *MODEL,
        "--max-entries",
        "900",
        "--window",
        "128",
        "--batch",
        "2",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(command_knn, "building", interrupting)
        code, _, err = run(*arguments)
    assert code == 130 and "same command again" in err and not folder.exists()
    assert json.loads((folder.with_name("store.building") / "keys.part" / "done").read_text()) == {"windows": 4}
    code, out, err = run(*arguments)
    assert code == 0 and "900 entries" in out, err


def test_a_build_that_was_killed_goes_on_in_another_process(text: Path, tmp_path: Path) -> None:
    """The bundled model gives the same keys again there, bit for bit, or the build would refuse to go on."""
    program = (
        "import os, signal\n"
        "from ralmspec.retrievers import datastore_build as building\n"
        "written, write = [], building.write_json\n"
        "def killing(path, content):\n"
        "    write(path, content)\n"
        "    written.append(path)\n"
        "    if len(written) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "building.write_json = killing\n"
        "from ralmspec.pipeline.cli import app\n"
        "app()\n"
    )
    arguments = [*MODEL, "--max-entries", "1200", "--window", "128", "--batch", "2"]
    build, folder = ["knn", "build", str(text)], tmp_path / "store"
    command = [sys.executable, "-c", program, *build, str(folder), *arguments]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "store.building" / "keys.part" / "done").read_text()) == {"windows": 6}
    for name in ("store", "whole"):
        code, _, err = run(*build, str(tmp_path / name), *arguments)
        assert code == 0, err
    for name in ("keys/keys.npy", "tokens/tokens.npy"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
