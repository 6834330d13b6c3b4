"""Corpus: how a data folder names its files, and errors that say where it looked and for what."""

from pathlib import Path

import pytest

from ralmspec.retrievers.corpus import Corpus
from ralmspec.retrievers.errors import BadKnowledge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "passages_wikipedia.jsonl.gz").write_bytes(b"")
    (tmp_path / "embeddings_wikipedia_minilm_f16.npy").write_bytes(b"")
    (tmp_path / "embeddings_other_minilm_f16.npy").write_bytes(b"")
    return tmp_path


def test_finds_the_files_by_name(folder: Path) -> None:
    corpus = Corpus.find(str(folder))
    assert corpus.passages == folder / "passages_wikipedia.jsonl.gz"
    assert corpus.embeddings == folder / "embeddings_wikipedia_minilm_f16.npy"


def test_prefers_the_plain_file(folder: Path) -> None:
    (folder / "passages_wikipedia.jsonl").write_bytes(b"")
    assert Corpus.find(folder).passages.name == "passages_wikipedia.jsonl"


def test_says_where_it_looked_and_for_what(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadKnowledge, match=r"nowhere: there is no such folder.*passages_wikipedia\.jsonl"):
        Corpus.find(tmp_path / "nowhere")
    with pytest.raises(BadKnowledge) as error:
        Corpus.find(folder, "other")
    assert f"{folder}: found neither passages_other.jsonl nor passages_other.jsonl.gz" in str(error.value)


def test_embeddings_must_be_there_and_be_the_only_ones(folder: Path) -> None:
    (folder / "embeddings_wikipedia_mpnet_f16.npy").write_bytes(b"")
    with pytest.raises(BadKnowledge, match=r"embeddings_wikipedia_\*\.npy, found .*minilm_f16\.npy, .*mpnet_f16\.npy"):
        Corpus.find(folder)
    for file in folder.glob("embeddings_wikipedia_*"):
        file.unlink()
    with pytest.raises(BadKnowledge, match="found none"):
        Corpus.find(folder)
