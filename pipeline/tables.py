"""Comparisons as tables for a terminal."""

from rich.table import Table

from .reports import Comparison


def comparison_table(report: Comparison) -> Table:
    """The rows, and with them what they were measured on."""
    facts = report.environment
    simulated = ", [yellow]retriever latency simulated[/yellow]" if facts["simulated_latency_s"] else ""
    table = Table(
        title=f"{facts['questions']} prompts, {facts['max_new_tokens']} tokens each{simulated}",
        caption=f"{facts['retriever']}\n"
        f"a = {facts['a_s'] * 1e3:.0f} ms a step, b = {facts['b_s'] * 1e3:.0f} ms a search, "
        f"b/a = {facts['b_over_a']:.2f}; "
        f"two threads on these cores overlap by {facts['overlap']['efficiency']:.2f}",
    )
    for column in (
        "arrangement",
        "latency s",
        "speed-up",
        "95 %",
        "γ",
        "rollbacks",
        "searches",
        "F_ideal",
        "F_miss",
        "identical",
    ):
        table.add_column(column, justify="left" if column == "arrangement" else "right", no_wrap=True)
    for row in report.rows:
        explained = f" +{row.explained} near-ties" if row.explained else ""
        table.add_row(
            row.arrangement,
            f"{row.latency_s:.2f}",
            f"[bold]{row.speedup:.2f}×[/bold]",
            f"{row.speedup_low:.2f}-{row.speedup_high:.2f}",
            "" if row.gamma is None else f"{row.gamma:.2f}",
            str(row.rollbacks),
            str(row.kb_calls),
            f"{row.f_ideal:.2f}",
            f"{row.f_miss:.2f}",
            f"{row.identical}/{row.outputs}{explained}",
        )
    return table
