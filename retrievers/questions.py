"""The question sets of a data folder, for measuring."""

from dataclasses import dataclass
from pathlib import Path

from .errors import BadKnowledge
from .jsonl import JsonLines


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the answers that count as right; `answers` may be empty."""

    id: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuestionFolder:
    """Files questions_<set>.jsonl[.gz] of {"id", "question", "answers"}."""

    folder: Path

    def sets(self) -> list[str]:
        """The names that `read` takes, in order."""
        files = [*self.folder.glob("questions_*.jsonl"), *self.folder.glob("questions_*.jsonl.gz")]
        return sorted({file.name.removeprefix("questions_").split(".jsonl")[0] for file in files})

    def read(self, set_name: str) -> list[Question]:
        """All questions of a set in file order; raises `BadKnowledge` naming the folder, or file and line."""
        try:
            path = JsonLines.find(self.folder, f"questions_{set_name}")
        except BadKnowledge as error:
            raise BadKnowledge(f"{error}; sets here: {', '.join(self.sets()) or 'none'}") from None
        with JsonLines(path) as lines:
            return [_question(lines, row) for row in range(len(lines))]


def _question(lines: JsonLines, row: int) -> Question:
    record = lines[row]
    answers = record.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise lines.fault(row, f'"answers" must be a list of strings, found {answers!r}')
    if not isinstance(record.get("id"), str | int):
        raise lines.fault(row, f'"id" must be a string or a number, found {record.get("id")!r}')
    return Question(str(record["id"]), lines.text(row, record, "question"), tuple(answers))
