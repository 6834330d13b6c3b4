"""Timelines as a picture: where the lane of Generate is empty, the model waits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ralmspec.stages.trace import Span

from .figures import figure_class

_LANES = {"lookup": "tab:olive", "generate": "tab:blue", "verify": "tab:orange"}
"""Those that are drawn; what Prefetch does takes next to no time."""


def check(path: Path) -> None:
    """Raise before anything is measured what `write` would raise after it: `MissingExtra`, or `ValueError` where the
    file's name does not say in which format it should be, or its folder does not exist."""
    known = figure_class()().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(f"{path}: a picture's name ends in .svg, .png or .pdf")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")


def write(path: Path, timelines: Mapping[str, Sequence[Span]], *, title: str = "") -> None:
    """One panel a timeline, one lane a stage, one clock for all; .svg, .png or .pdf, by the name of the file.

    Searches in flight at the same time lie upon each other, and rollbacks are lines. Raises `MissingExtra`.
    """
    figure = figure_class()(figsize=(9, 0.8 + 1.2 * len(timelines)), layout="constrained")
    panels = figure.subplots(len(timelines), sharex=True, squeeze=False)[:, 0]
    for axes, (name, spans) in zip(panels, timelines.items(), strict=True):
        _draw(axes, name, spans)
    panels[-1].set_xlabel("seconds")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path)


def _draw(axes: Any, name: str, spans: Sequence[Span]) -> None:
    zero, end = min(span.start for span in spans), max(span.end for span in spans)
    for lane, (stage, colour) in enumerate(_LANES.items()):
        bars = [(span.start - zero, span.end - span.start) for span in spans if span.stage == stage]
        axes.broken_barh(bars, (lane - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.3)
    rollbacks = [span.start - zero for span in spans if span.stage == "rollback"]
    axes.vlines(rollbacks, -0.5, len(_LANES) - 0.5, color="tab:red", linewidth=0.8)
    axes.vlines([end - zero], -0.5, len(_LANES) - 0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(_LANES)), labels=[*_LANES])
    axes.set(xlim=(0, None), ylim=(len(_LANES) - 0.5, -0.5))
    taken_back = f", {len(rollbacks)} rollbacks" if rollbacks else ""
    axes.set_title(f"{name}: {end - zero:.1f} s{taken_back}", loc="left", fontsize="medium")
