# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""`knn tune` and `knn perplexity`: what they print and write, what they warn of, and what they refuse."""

import json
import math
import signal
from pathlib import Path

import pytest
import typer
from test_perplexity import CONTEXT, WINDOW, sentences
from tiny_models import tiny_model
from typer.testing import CliRunner

from ralmspec.pipeline import command_knn_perplexity
from ralmspec.pipeline.perplexity import gather
from ralmspec.retrievers.datastore_build import DatastoreOptions, build_datastore

pytest.importorskip("torch", reason="needs ralmspec[local]")
pytest.importorskip("faiss", reason="needs ralmspec[local]")

app = typer.Typer()
app.command("tune")(command_knn_perplexity.tune_command)
app.command("perplexity")(command_knn_perplexity.perplexity_command)


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore of sentences, these sentences, others of the same words, and settings that were tuned on these."""
    from ralmspec.stages.transformers_model import TransformersModel

    folder = tmp_path_factory.mktemp("perplexity")
    (folder / "stored.txt").write_text(sentences(0, 20))
    (folder / "held_out.txt").write_text(sentences(1, 20))
    (folder / "short.txt").write_text("Too short.\n")
    model = TransformersModel.load(tiny_model("llama", folder))
    options = DatastoreOptions(window=WINDOW, context=CONTEXT, kinds=("exact", "hnsw", "ivf"), ivf_lists=40)
    build_datastore([folder / "stored.txt"], folder / "datastore", model, options)
    tiny_model("opt", folder)
    code, _, err = run("tune", *on(folder, "held_out"), "--top-k-max", "20", "--json", str(folder / "settings.json"))
    assert code == 0, err
    (folder / "lean.json").write_text('{"environment": {}, "perplexity": 1, "bits_per_byte": 1, "mixtures": []}')
    return folder


def on(folder: Path, text: str, *, model: str = "llama") -> list[str]:
    places = ["--datastore", str(folder / "datastore"), "--model", str(folder / model), "--model-threads", "1"]
    return [str(folder / f"{text}.txt"), *places, "--tokens", "200"]


def test_tune_says_which_options_to_use_and_perplexity_takes_them(folder: Path, tmp_path: Path) -> None:
    tuned, measured = tmp_path / "tuned.json", tmp_path / "measured.json"
    code, out, err = run("tune", *on(folder, "stored"), "--top-k-max", "20", "--json", str(tuned))
    assert code == 0, err
    first = json.loads(tuned.read_text())
    assert [one["top_k"] for one in first["mixtures"]] == [1, 8, 20]
    best = min(first["mixtures"], key=lambda one: one["perplexity"])
    assert f"use --top-k {best['top_k']} --interpolation {best['interpolation']:g} --temperature" in out
    assert all(one["ratio_high"] < 0.5 and one["interpolation"] > 0.9 for one in first["mixtures"])
    assert "model alone" in out and f"{best['perplexity']:.2f}" in out and "WORSE" not in err
    assert first["environment"]["datastore"] == "datastore" and first["environment"]["tokens"] == 200
    assert (first["environment"]["window"], first["environment"]["context"]) == (WINDOW, CONTEXT)

    code, out, err = run("perplexity", *on(folder, "stored"), "--settings", str(tuned), "--json", str(measured))
    assert code == 0, err
    second = json.loads(measured.read_text())
    assert second["mixtures"] == first["mixtures"] and second["perplexity"] == first["perplexity"]
    code, _, err = run(
        "perplexity", *on(folder, "stored"), "--top-k", f"{best['top_k']}", "--json", str(measured),
        "--interpolation", str(best["interpolation"]), "--temperature", str(best["temperature"]),
    )  # fmt: skip
    assert code == 0, err
    [again] = json.loads(measured.read_text())["mixtures"]
    assert again == pytest.approx(best, rel=1e-6)


def test_by_default_there_are_no_more_neighbours_than_entries(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    for command in ("tune", "perplexity"):
        code, _, err = run(command, *on(folder, "held_out"), "--json", str(report))
        assert code == 0, err
        assert [one["top_k"] for one in json.loads(report.read_text())["mixtures"]] == [1, 8, 64, 256]


def test_it_warns_where_knn_lm_is_not_better(folder: Path, tmp_path: Path) -> None:
    """Sentences of words in random order: which followed which elsewhere is of little help."""
    report = tmp_path / "report.json"
    code, out, err = run(
        "perplexity", *on(folder, "held_out"), "--top-k", "1,8", "--interpolation", "0.99", "--json", str(report)
    )
    assert code == 0
    worse = [one["top_k"] for one in json.loads(report.read_text())["mixtures"] if one["ratio_low"] > 1]
    assert worse[0] == 1 and "with 1 neighbours KNN-LM is WORSE than the model alone" in err
    code, out, err = run("perplexity", *on(folder, "held_out"), "--top-k", "1", "--interpolation", "1")
    assert code == 0 and "inf" in out
    assert "WORSE" in err and "knn tune" in err


@pytest.mark.parametrize("retriever", ["hnsw", "ivf"])
def test_approximate_searches_say_how_many_they_found(folder: Path, tmp_path: Path, retriever: str) -> None:
    report = tmp_path / "report.json"
    code, out, err = run(
        "perplexity", *on(folder, "stored"), "--top-k", "300", "--retriever", retriever, "--ef-search", "10",
        "--probes", "2", "--json", str(report),
    )  # fmt: skip
    assert code == 0, err
    written = json.loads(report.read_text())
    [one] = written["mixtures"]
    assert retriever in written["environment"]["retriever_description"].lower()
    if retriever == "ivf":
        assert 1 <= one["neighbours"] < 200 and f"{one['neighbours']:.0f} found" in out
    else:
        assert one["neighbours"] > 290, "as wide as there are neighbours"
    assert math.isfinite(one["perplexity"])


@pytest.mark.parametrize(
    ("command", "text", "options", "says"),
    [
        ("tune", "nowhere", [], "nowhere.txt: there is no such file"),
        ("tune", "short", [], "short.txt: has"),
        ("tune", "held_out", ["--tokens", "99"], "--tokens"),
        ("tune", "held_out", ["--retriever", "flat"], "exact, hnsw, ivf"),
        ("tune", "held_out", ["--datastore", "nowhere"], "ralmspec knn build"),
        ("tune", "held_out", ["--model", "{folder}/opt"], "were made by another model"),
        ("perplexity", "nowhere", [], "no such file"),
        ("perplexity", "held_out", ["--top-k", "8,many"], "--top-k: 'many' is not a number"),
        ("perplexity", "held_out", ["--top-k", "0"], "--top-k: 0 is no number of neighbours"),
        ("perplexity", "held_out", ["--top-k", "8,100000"], "--top-k 100000: the datastore has only"),
        ("perplexity", "held_out", ["--temperature", "0"], "must be a positive number"),
        ("perplexity", "held_out", ["--interpolation", "1.5"], "--interpolation"),
        ("perplexity", "held_out", ["--settings", "{folder}/nowhere"], "nowhere: is no file that `knn tune --json`"),
        ("perplexity", "held_out", ["--settings", "{folder}/short.txt"], "short.txt: is no file that `knn tune"),
        ("perplexity", "held_out", ["--settings", "{folder}/lean.json"], "holds no settings at all"),
        ("perplexity", "held_out", ["--settings", "{folder}/settings.json", "--top-k", "9"], "only for 1, 8, 20"),
        ("perplexity", "held_out", ["--settings", "{folder}/settings.json", "--temperature", "3"], "not both"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(folder: Path, command: str, text: str, options: list[str], says: str):
    code, out, err = run(command, *on(folder, text), *(option.format(folder=folder) for option in options))
    assert code == 2 and out == ""
    assert says in err and "Traceback" not in err


@pytest.mark.parametrize("part", ["reading", "searching"])
def test_an_interruption_ends_it_and_leaves_no_report(folder: Path, tmp_path: Path, monkeypatch, part: str) -> None:
    def interrupted(*arguments, tell, **settings):
        def telling(name: str, done: int, total: int) -> None:
            tell(name, done, total)
            if name == part and done > 0:
                signal.raise_signal(signal.SIGINT)

        return gather(*arguments, tell=telling, **settings)

    monkeypatch.setattr(command_knn_perplexity, "gather", interrupted)
    code, out, err = run("tune", *on(folder, "held_out"), "--json", str(tmp_path / "report.json"))
    assert (code, out) == (130, "") and err.endswith("interrupted")
    assert not (tmp_path / "report.json").exists()
