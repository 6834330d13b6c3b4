"""Passages: read by id when asked for, with errors that name file and line."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralmspec.retrievers import jsonl
from ralmspec.retrievers.base import Document
from ralmspec.retrievers.errors import BadKnowledge
from ralmspec.retrievers.passages import Passages

RECORDS: list[dict[str, Any]] = [{"id": row, "title": f"Übung {row}", "text": "x\u2028" * row} for row in range(5)]


def write(path: Path, lines: list[str], *, end: str = "\n") -> Path:
    content = ("\n".join(lines) + end).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def good(path: Path) -> Path:
    return write(path, [json.dumps(record, ensure_ascii=False) for record in RECORDS])


@pytest.mark.parametrize("name", ["passages.jsonl", "passages.jsonl.gz"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_every_passage_comes_back_by_id(tmp_path: Path, name: str, end: str) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    with Passages(write(tmp_path / name, lines, end=end)) as passages:
        assert len(passages) == 5
        assert list(passages) == [Document(r["id"], r["title"], r["text"]) for r in RECORDS]
        assert passages[np.int64(3)] == passages[3]
        assert type(passages[np.int64(3)].id) is int


@given(texts=st.lists(st.text(), min_size=1), chunk=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_any_text_survives_wherever_its_line_is_cut_for_indexing(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk: int
) -> None:
    path = tmp_path_factory.mktemp("passages") / "p.jsonl"
    write(path, [json.dumps({"id": i, "title": "", "text": text}) for i, text in enumerate(texts)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_CHUNK", chunk)
        with Passages(path) as passages:
            assert [passage.text for passage in passages] == texts


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_threads_may_read_at_once(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"id": i, "title": "t", "text": str(i) * 50}) for i in range(200)]
    with Passages(write(tmp_path / name, lines)) as passages, ThreadPoolExecutor(4) as threads:
        ids = list(range(200)) * 5
        assert [d.text for d in threads.map(passages.__getitem__, ids)] == [str(i) * 50 for i in ids]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1, "title": "a", "text": "b"', "line 2"),
        ("", "line 2"),
        ("[1]", "line 2: expected a JSON object, found list"),
        ("[" * 100_000, "line 2"),
        ('{"id": 1, "text": "b"}', 'line 2: "title" must be a string, found nothing'),
        ('{"id": 1, "title": "a", "text": 7}', 'line 2: "text" must be a string, found 7'),
        ('{"id": 7, "title": "a", "text": "b"}', 'line 2: "id" must be 1, the row, found 7'),
        ('{"title": "a", "text": "b"}', 'line 2: "id" must be 1, the row, found None'),
    ],
)
def test_a_bad_line_is_named_and_leaves_the_others_readable(tmp_path: Path, line: str, message: str) -> None:
    path = write(
        tmp_path / "p.jsonl", ['{"id": 0, "title": "a", "text": "b"}', line, '{"id": 2, "title": "", "text": ""}']
    )
    with Passages(path) as passages:
        with pytest.raises(BadKnowledge) as error:
            passages[1]
        assert str(path) in str(error.value)
        assert message in str(error.value)
        assert passages[0].text == "b"
        assert passages[2].id == 2


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"id": 0, "title": "\xff", "text": ""}\n')
    with Passages(path) as passages, pytest.raises(BadKnowledge, match="line 1: .*utf-8"):
        passages[0]


@pytest.mark.parametrize("id", [-1, 5, 10**12])
def test_an_id_that_is_not_there_is_refused(tmp_path: Path, id: int) -> None:
    with Passages(good(tmp_path / "p.jsonl")) as passages, pytest.raises(BadKnowledge, match=f"no row {id}.*0 to 4"):
        passages[id]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadKnowledge, match=r"nowhere\.jsonl: there is no such file"):
        Passages(tmp_path / "nowhere.jsonl")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadKnowledge, match="cannot be read"):
        Passages(tmp_path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadKnowledge, match="empty"):
        Passages(write(tmp_path / name, [], end=""))


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_a_broken_gzip_is_refused(tmp_path: Path, damage: str) -> None:
    path = good(tmp_path / "p.jsonl.gz")
    packed = bytearray(path.read_bytes())
    match damage:
        case "cut":
            del packed[-12:]
        case "flipped":
            packed[30] ^= 0xFF
        case _:
            packed[:] = b"plain text"
    path.write_bytes(packed)
    with pytest.raises(BadKnowledge, match=r"p\.jsonl\.gz: cannot be read"):
        Passages(path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_a_closed_file_answers_no_more(tmp_path: Path, name: str) -> None:
    passages = Passages(good(tmp_path / name))
    passages.close()
    passages.close()
    with pytest.raises(BadKnowledge):
        passages[0]
