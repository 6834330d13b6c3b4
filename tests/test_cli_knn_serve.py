"""KNN-LM from the command line: go on from a prompt, compare, verify, and what goes wrong."""

import json
from pathlib import Path

import pytest
from test_cli import DEMO, run
from test_cli_knn import MODEL, store, text  # noqa: F401 (fixtures)

from ralmspec.pipeline.held_out import held_out_prompts
from ralmspec.retrievers.errors import BadKnowledge
from ralmspec.stages.transformers_model import TransformersModel


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held") / "out.txt"
    path.write_text("The town lies on the river, and its people have lived from it in good years and bad.\n" * 20)
    return path


def test_ask_goes_on_from_a_prompt_and_names_its_nearest_entries(store: Path) -> None:  # noqa: F811
    code, out, err = run(
        "knn", "ask", "The river", "--datastore", str(store), *MODEL, "--max-new-tokens", "6", "--top-k", "4",
        "--sources",
    )  # fmt: skip
    assert code == 0, err
    assert "6 tokens in" in out and "6 retrievals in" in out and "squared L2" in out and "entry" in out


def test_compare_writes_the_contract_for_every_stride(store: Path, held_out: Path, tmp_path: Path) -> None:  # noqa: F811
    report = tmp_path / "report.json"
    code, out, err = run(
        "knn", "compare", str(held_out), "--datastore", str(store), *MODEL, "--prompts", "2", "--prompt-tokens", "16",
        "--max-new-tokens", "8", "--top-k", "4", "--retriever", "hnsw", "--retriever-latency", "0.02",
        "--json", str(report),
    )  # fmt: skip
    assert code == 0, err
    assert "simulated" in out and "HNSW" in out
    written = json.loads(report.read_text())
    assert [row["arrangement"] for row in written["rows"]] == [
        "RaLMSeq", "s=1", "s=2", "s=4", "s=8", "OS3", "s=1 +A", "s=2 +A", "s=4 +A", "s=8 +A", "OS3 +A", "continuous",
        "adaptive",
    ]  # fmt: skip
    assert all((row["identical"] + row["explained"], row["outputs"]) == (2, 2) for row in written["rows"])
    assert (written["environment"]["top_k"], written["environment"]["datastore"]) == (4, "store")
    assert written["rows"][0]["kb_calls"] == 2 * 8, "a retrieval a token"


def test_a_drafter_guesses_beside_the_cache(store: Path, held_out: Path, tmp_path: Path) -> None:  # noqa: F811
    report = tmp_path / "report.json"
    code, out, err = run(
        "knn", "compare", str(held_out), "--datastore", str(store), *MODEL, "--prompts", "1", "--prompt-tokens", "16",
        "--max-new-tokens", "8", "--top-k", "4", "--retriever", "exact", "--drafter", "hnsw",
        "--only", "OS3,continuous", "--json", str(report),
    )  # fmt: skip
    assert code == 0, out + err
    rows = {row["arrangement"]: row for row in json.loads(report.read_text())["rows"]}
    assert all(row["identical"] == 1 for row in rows.values())
    assert rows["OS3"]["drafter_hits"] == 0 < rows["continuous"]["drafter_hits"]


def test_verify_holds_every_arrangement_against_the_sequential_one(
    store: Path,  # noqa: F811
    held_out: Path,
    tmp_path: Path,
) -> None:
    report = tmp_path / "report.json"
    code, out, err = run(
        "knn", "verify-lossless", str(held_out), "--datastore", str(store), *MODEL, "--prompts", "2",
        "--prompt-tokens", "16", "--max-new-tokens", "8", "--top-k", "4", "--retriever", "ivf", "--dtype", "float64",
        "--strides", "2,os3", "--json", str(report),
    )  # fmt: skip
    assert code == 0, err
    assert "12 outputs of 6 arrangements: 12 identical" in out
    assert json.loads(report.read_text())["identical"] == 12


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--prompts", "999"], "999 prompts of 16 tokens need"),
        (["--datastore", "nowhere"], "nowhere"),
        (["--retriever", "bm25"], "searched by exact, hnsw, ivf, not 'bm25'"),
        (["--drafter", "bm25"], "searched by exact, hnsw, ivf, not 'bm25'"),
        (["--only", "s=3"], "'s=3' is not one of"),
        (["--temperature", "0"], "temperature=0"),
    ],
)
def test_what_cannot_be_served_is_said(
    store: Path,  # noqa: F811
    held_out: Path,
    arguments: list[str],
    complaint: str,
) -> None:
    given = ["--datastore", str(store), *MODEL, "--prompt-tokens", "16", "--prompts", "1", *arguments]
    code, _, err = run("knn", "compare", str(held_out), *given)
    assert code == 2 and complaint in " ".join(err.replace("│", " ").split())


def test_prompts_are_spread_over_the_text_and_long_enough(held_out: Path) -> None:
    model = TransformersModel.load(DEMO / "model")
    prompts = held_out_prompts(model, held_out, count=5, tokens=16)
    assert len(set(prompts)) == 5 and all(len(model.encode(prompt)) >= 16 for prompt in prompts)
    whole = model.decode(model.encode(held_out.read_text()))
    assert whole.startswith(prompts[0]) and whole.endswith(prompts[-1])
    with pytest.raises(BadKnowledge, match="no such file"):
        held_out_prompts(model, held_out.with_name("absent.txt"), count=1, tokens=4)
