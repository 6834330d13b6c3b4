"""What all questions together say of locality: figures with intervals, as tables and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from .locality_counts import Counts

GROUPS = {
    "guesses": ("the guess is right (γ), by what it is made from", ""),
    "survival": ("a wrong guess's tokens under the true document", ""),
    "certificates": ("no search was needed: the last four prove the first document", ""),
    "queries": ("how far queries and documents move", ""),
    "times": ("a step of RaLMSeq, mean", " ms"),
    "passes": ("each alone, mean; a tenth were shorter than the last column says", " ms"),
}
"""Title and unit of each group of figures."""
STEP = ("encode the query", "search for the document", "prefill", "decode")
"""The parts that make up a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A ratio of sums over questions, with its 95 % bootstrap interval, and the same of every question set alone."""

    group: str
    name: str
    value: float
    low: float
    high: float
    of: int
    """How many steps, tokens or passes it is a mean over."""
    by_set: dict[str, float]
    tenth: float | None = None
    """Of a time: a tenth of all measured were shorter."""


def figures(counts: Sequence[Counts]) -> list[Figure]:
    """Every figure that has something to be a mean over. Resampled are questions, not steps."""
    names = [
        name for group in GROUPS for name in dict.fromkeys(n for one in counts for n in one.sums) if name[0] == group
    ]
    draws = np.random.default_rng(0).integers(0, len(counts), (2000, len(counts)))
    made = []
    for group, name in names:
        pairs = np.array([one.sums.get((group, name), (0.0, 0)) for one in counts])
        if not pairs[:, 1].any():
            continue
        totals, numbers = pairs[draws].sum(axis=1).T
        low, high = np.quantile(totals[numbers > 0] / numbers[numbers > 0], (0.025, 0.975))
        total, number = pairs.sum(axis=0)
        times = [value for one in counts for value in one.passes.get((group, name), ())]
        by_set = {}
        for question_set in dict.fromkeys(one.question_set for one in counts):
            mine = pairs[[one.question_set == question_set for one in counts]].sum(axis=0)
            if mine[1]:
                by_set[question_set] = float(mine[0] / mine[1])
        made.append(
            Figure(
                group=group,
                name=name,
                value=float(total / number),
                low=float(low),
                high=float(high),
                of=int(number),
                by_set=by_set,
                tenth=float(np.quantile(times, 0.1)) if times else None,
            )
        )
    return made


def _lines(found: Sequence[Figure], group: str, sets: Sequence[str]) -> list[list[str]]:
    lines = []
    for figure in found:
        if figure.group == group:
            alone = [_text(figure.by_set[name]) if name in figure.by_set else "" for name in sets]
            interval = f"{_text(figure.low)} to {_text(figure.high)}"
            tenth = [] if figure.tenth is None else [_text(figure.tenth)]
            lines.append([figure.name, _text(figure.value), interval, *alone, f"{figure.of:,}", *tenth])
    return lines


def _head(title: str, line: Sequence[str], sets: Sequence[str]) -> list[str]:
    """As many columns as this line has."""
    return [title, "all", "95 %", *sets, "of", "a tenth below"][: len(line)]


def _text(value: float) -> str:
    return f"{value:.3f}" if value < 2 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _sets(found: Sequence[Figure]) -> list[str]:
    return list(dict.fromkeys(name for figure in found for name in figure.by_set))


def tables(found: Sequence[Figure]) -> list[Table]:
    """One table a group, for a terminal."""
    made, sets = [], _sets(found)
    for group, (title, unit) in GROUPS.items():
        if lines := _lines(found, group, sets):
            table = Table(title=title + unit.replace(" ", ", "))
            for column in _head("", lines[0], sets):
                table.add_column(column, justify="right" if column else "left")
            for line in lines:
                table.add_row(*line)
            made.append(table)
    return made


def markdown(found: Sequence[Figure], facts: dict[str, Any]) -> str:
    """The same tables, with what they were measured on."""
    sets = _sets(found)
    by_set = ", ".join(f"{name} {count}" for name, count in facts["questions_by_set"].items())
    lines = [
        f"{facts['questions']} questions ({by_set}), {facts['max_new_tokens']} tokens each: the path of RaLMSeq, and "
        "what would have been guessed along it.",
        f"{facts['retriever']}; {facts['date']}, {facts['machine']}, load average {facts['load_average']}. "
        f"`{facts['command']}`",
        "",
        "Intervals are 95 %, by bootstrap over questions. A guess is counted at every step but a path's first; the",
        "last column says how many steps, tokens or passes a figure is a mean over.",
    ]
    for group, (title, unit) in GROUPS.items():
        if rows := _lines(found, group, sets):
            head = _head(title + unit.replace(" ", ", "), rows[0], sets)
            lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def plot(found: Sequence[Figure], path: Path, figure_class: Any) -> None:
    """Rates as bars with their intervals, and below them the parts of a step one after the other."""
    rates = [figure for figure in found if figure.group in ("guesses", "certificates") or figure.name.startswith("γ")]
    figure = figure_class(figsize=(9, 1.6 + 0.27 * len(rates)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(0.27 * len(rates), 0.8))
    shades = {"guesses": "C0", "survival": "C2", "certificates": "C1"}
    labels = [("sure without a search, " if f.group == "certificates" else "") + f.name for f in rates]
    values = [figure.value for figure in rates]
    errors = [[f.value - f.low for f in rates], [f.high - f.value for f in rates]]
    above.barh(range(len(rates)), values, xerr=errors, color=[shades[f.group] for f in rates], ecolor="0.3")
    above.set_yticks(range(len(rates)), labels=labels, fontsize="small")
    above.set(xlim=(0, 1), ylim=(len(rates) - 0.4, -0.6), xlabel="share of steps")
    above.grid(axis="x", alpha=0.3)
    left = 0.0
    for part in STEP:
        taken = next((f.value for f in found if (f.group, f.name) == ("times", part)), 0.0)
        below.barh([0], [taken], left=[left], label=f"{part}: {taken:.1f}")
        left += taken
    below.set(yticks=[], xlabel="milliseconds of a step, mean")
    figure.legend(ncols=4, fontsize="small", loc="outside lower center", frameon=False)
    figure.savefig(path)
