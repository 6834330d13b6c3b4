"""A folder of passages, embeddings and questions, found by their names: what `--data DIR` means."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .errors import BadKnowledge
from .jsonl import JsonLines


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the answers that count as right; `answers` may be empty."""

    id: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of one knowledge base, and the question sets beside it.

    passages_<name>.jsonl[.gz]      the texts, see `Passages`
    embeddings_<name>_<model>.npy   their vectors, one row a passage, see `ExactDense`
    questions_<set>.jsonl[.gz]      {"id", "question", "answers"}
    """

    folder: Path
    passages: Path
    embeddings: Path

    @classmethod
    def find(cls, folder: str | Path, name: str = "wikipedia") -> Self:
        """Finds the files by name; raises `BadKnowledge` saying where it looked and for what."""
        folder = Path(folder)
        if not folder.is_dir():
            raise BadKnowledge(f"{folder}: there is no such folder; give the one that holds passages_{name}.jsonl[.gz]")
        return cls(folder, _lines(folder, f"passages_{name}"), _only(folder, f"embeddings_{name}_*.npy"))

    def question_sets(self) -> list[str]:
        """The names that `questions` takes, in order."""
        files = [*self.folder.glob("questions_*.jsonl"), *self.folder.glob("questions_*.jsonl.gz")]
        return sorted({file.name.removeprefix("questions_").split(".jsonl")[0] for file in files})

    def questions(self, set_name: str) -> list[Question]:
        """All questions of a set in file order; raises `BadKnowledge` naming the folder, or file and line."""
        try:
            path = _lines(self.folder, f"questions_{set_name}")
        except BadKnowledge as error:
            raise BadKnowledge(f"{error}; sets here: {', '.join(self.question_sets()) or 'none'}") from None
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


def _lines(folder: Path, stem: str) -> Path:
    """The plain file if it is there (it is mapped, not unpacked), else the gzipped one."""
    for path in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz"):
        if path.is_file():
            return path
    raise BadKnowledge(f"{folder}: found neither {stem}.jsonl nor {stem}.jsonl.gz")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        raise BadKnowledge(f"{folder}: looked for one file {pattern}, found {names or 'none'}")
    return found[0]
