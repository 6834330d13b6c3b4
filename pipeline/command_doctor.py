"""`ralmspec doctor`: what this machine and installation can do, and what to change."""

import json as as_text
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .doctor import as_json, examine
from .terminal import err, out


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at cores, threads, libraries and Java; measure how far two threads overlap; say what to change."""
    with err.status("measuring"):
        findings = examine()
    if json:
        out.print_json(as_text.dumps(as_json(findings)))
        return
    table = Table(show_header=False, box=None)
    for finding in findings:
        table.add_row(finding.name, escape(finding.value))
        if finding.advice:
            table.add_row("", f"[yellow]{escape(finding.advice)}[/yellow]")
    out.print(table)
