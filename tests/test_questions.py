"""QuestionFolder: question sets by name, packed and plain, and errors that name the line."""

import gzip
import json
from pathlib import Path

import pytest

from ralmspec.pipeline import BadKnowledge
from ralmspec.retrievers.questions import Question, QuestionFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record = {"id": 7, "question": "who?", "answers": ["a", "b"], "extra": 1}
    (tmp_path / "questions_nq.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    (tmp_path / "questions_webquestions.jsonl").write_text('{"id": "w1", "question": "x", "answers": []}\n')
    return tmp_path


def test_reads_questions_packed_and_plain(folder: Path) -> None:
    questions = QuestionFolder(folder)
    assert questions.sets() == ["nq", "webquestions"]
    assert questions.read("nq") == [Question("7", "who?", ("a", "b"))]
    assert questions.read("webquestions") == [Question("w1", "x", ())]


def test_an_unknown_set_is_told_what_there_is(folder: Path) -> None:
    with pytest.raises(BadKnowledge, match=r"questions_tqa\.jsonl.*sets here: nq, webquestions"):
        QuestionFolder(folder).read("tqa")


@pytest.mark.parametrize(
    "line",
    ['{"id": 1, "question": "x"}', '{"id": 1, "question": 2, "answers": []}', '{"question": "x", "answers": []}', "{"],
)
def test_a_bad_question_is_named_by_line(folder: Path, line: str) -> None:
    path = folder / "questions_webquestions.jsonl"
    path.write_text('{"id": "w1", "question": "x", "answers": []}\n' + line + "\n")
    with pytest.raises(BadKnowledge, match=r"questions_webquestions\.jsonl, line 2"):
        QuestionFolder(folder).read("webquestions")
