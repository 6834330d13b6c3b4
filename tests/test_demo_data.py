"""The bundled data is whole: counts fit, rows are ids, vectors have length one, sums match, the answers are there."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo"
PASSAGES = "passages_wikipedia.jsonl.gz"
EMBEDDINGS = "embeddings_wikipedia_minilm_f16.npy"
QUESTIONS = "questions_nq.jsonl.gz"


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def passages() -> list[dict[str, Any]]:
    return read(DEMO / PASSAGES)


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    return read(DEMO / QUESTIONS)


def test_passages_are_numbered_by_row_and_articles_stay_together(passages: list[dict[str, Any]]) -> None:
    assert 5_000 <= len(passages) <= 7_000
    assert [passage["id"] for passage in passages] == list(range(len(passages)))
    assert all(passage["title"].strip() and passage["text"].strip() for passage in passages)
    titles = [passage["title"] for passage in passages]
    starts = [title for title, before in zip(titles, ["", *titles], strict=False) if title != before]
    assert len(starts) == len(set(titles))


def test_embeddings_fit_the_passages_and_have_length_one(passages: list[dict[str, Any]]) -> None:
    vectors = np.load(DEMO / EMBEDDINGS)
    assert vectors.shape == (len(passages), 384)
    assert vectors.dtype == np.float16
    lengths = np.linalg.norm(vectors.astype(np.float32), axis=1)
    assert np.abs(lengths - 1).max() < 1e-3


def test_neighbouring_passages_have_near_vectors(passages: list[dict[str, Any]]) -> None:
    """A row shifted against its passage would leave neighbours of one article no nearer than strangers."""
    vectors = np.load(DEMO / EMBEDDINGS).astype(np.float32)
    near = np.einsum("ij,ij->i", vectors[:-1], vectors[1:])
    same = np.array([one["title"] == two["title"] for one, two in zip(passages, passages[1:], strict=False)])
    assert near[same].mean() > near[~same].mean() + 0.3


def test_every_question_is_answered_word_for_word(
    questions: list[dict[str, Any]], passages: list[dict[str, Any]]
) -> None:
    assert 36 <= len(questions) <= 60
    assert len({question["id"] for question in questions}) == len(questions)
    text = "\n".join(passage["text"] for passage in passages)
    for question in questions:
        assert re.fullmatch(r"nq-dev-\d{5}", question["id"]), "only Natural Questions may be passed on"
        answers = [answer for answer in question["answers"] if len(answer) >= 4 and len(answer.split()) <= 5]
        assert any(answer in text for answer in answers), question


def test_model_and_tokenizer_fit_each_other() -> None:
    config = json.loads((DEMO / "model" / "config.json").read_text())
    tokenizer = json.loads((DEMO / "model" / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == config["vocab_size"]
    assert tokenizer["model"]["vocab"]["<|endoftext|>"] == config["eos_token_id"]
    with (DEMO / "model" / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], config["hidden_size"]]


def test_readme_lists_every_file_with_its_sum() -> None:
    table = (DEMO / "README.md").read_text(encoding="utf-8").partition("## Files\n")[2]
    listed = re.findall(r"^\| (\S+) \| ([\d,]+) \| ([0-9a-f]{64}) \|$", table, flags=re.MULTILINE)
    files = [path for path in sorted(DEMO.rglob("*")) if path.is_file() and path.name != "README.md"]
    assert listed == [
        (
            path.relative_to(DEMO).as_posix(),
            f"{path.stat().st_size:,}",
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in files
    ]
    assert sum(path.stat().st_size for path in files) < 80_000_000


def test_the_build_script_makes_these_files_again(tmp_path: Path) -> None:
    if not os.environ.get("RALMSPEC_DATA"):
        pytest.skip("RALMSPEC_DATA names no folder with the full data")
    command = [sys.executable, str(ROOT / "examples" / "build_demo.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in (PASSAGES, QUESTIONS):  # unpacked: zlib versions differ in how they pack
        assert gzip.decompress((tmp_path / name).read_bytes()) == gzip.decompress((DEMO / name).read_bytes())
    assert (tmp_path / EMBEDDINGS).read_bytes() == (DEMO / EMBEDDINGS).read_bytes()
