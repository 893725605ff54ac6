"""Tables of evaluations, on a console."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from equifast.cli._common import stdout
from equifast.evaluate import Cost, Report
from equifast.evaluate.detection import DetectionReport
from equifast.evaluate.records import CLEAN
from equifast.evaluate.tables import Grid, grid

__all__ = ["FOOTNOTE", "cells", "detection_tables", "show", "signed"]

FOOTNOTE = "* forward passes of an image, by area; a backward pass counts as two"


_WIDEST = 10_000  # characters of a table's line


def show(
    tables: Sequence[tuple[str, list[str], list[list[str]]]], warnings: Sequence[str], footnote: str = FOOTNOTE
) -> None:
    for title, headings, rows in tables:  # names are a user's, who may have put brackets into them
        table = Table(title=escape(title))
        for heading in headings:
            table.add_column(escape(heading), justify="right" if heading else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        wide = Measurement.get(stdout, stdout.options.update(width=_WIDEST), table).maximum
        # a terminal folds what is too wide; a file has no edge
        console = stdout if stdout.is_terminal else Console(file=stdout.file, width=max(stdout.width, wide))
        console.print(table)
    if footnote:
        stdout.print(footnote, highlight=False, soft_wrap=True)
    for warning in warnings:
        stdout.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)


def cells(report: Report, costs: Mapping[str, Cost]) -> Grid:
    """Attackers down, or defenses where there are many."""
    columns = report.cells()
    for defense, column in columns.items():
        spent = costs[defense]
        column["s/image"], column["forward passes' time"] = f"{spent.seconds:.3f}", f"{spent.times:.1f}"
        column["passes*"], column["MiB"] = f"{spent.passes:.1f}", f"{spent.mebibytes:.0f}"
    return grid(columns)


def signed(differences: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    def text(cell: Mapping[str, Any]) -> str:
        error = "?" if cell["error"] is None else f"{cell['error']:.1f}"
        return f"{cell['value']:+.1f} ± {error}"

    return {defense: {attack: text(cell) for attack, cell in row.items()} for defense, row in differences.items()}


_SEPARATION = {
    "auroc": "area under the characteristic",
    "aupr": "average precision",
    "fpr95": "clean images above the threshold that 95% of the others reach",
}


def _separation_tables(
    report: DetectionReport, rows: Mapping[str, str], of: str
) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables of the three figures, of rows by their headings."""
    names = list(report.scores)
    return [
        (
            f"{what} in %, {of}",
            ["", *names],
            [[head, *(str(getattr(report.separations[n][kind], key)) for n in names)] for head, kind in rows.items()],
        )
        for key, what in _SEPARATION.items()
    ]


def detection_tables(
    study: str, report: DetectionReport, every: bool = False
) -> list[tuple[str, list[str], list[list[str]]]]:
    """All tables; of corruptions those of severity 3 where not ``every`` is wanted, and the mean of each severity."""
    names, kinds = list(report.scores), list(report.groups)
    first = names[0]
    of = f"{report.images} images (95% by bootstrap)"
    if study == "corruptions":
        means = report.means()
        chosen = {kind if every else kind.rsplit(" ", 1)[0]: kind for kind in kinds if every or kind.endswith(" 3")}
        groups = list(dict.fromkeys(group for group in report.groups.values() if group))
        found = _separation_tables(report, chosen, of if every else f"severity 3, {of}")
        found[0][2].extend([f"mean, {group}", *(str(means[n][group]) for n in names)] for group in groups)
        return found
    rates = [[kind, *(f"{report.flagged(n, kind).value:.1f}" for n in names)] for kind in (CLEAN, *kinds)]
    damage = [
        [kind, *(str(report.damage(n, kind)) for n in (names if report.groups.get(kind) == "evading" else [first]))]
        for kind in (CLEAN, *kinds)
        if report.groups.get(kind) != "foreign"
    ]
    evaded = ", of those who evade at theirs" if "evading" in report.groups.values() else ""
    times = [["ms per image", *(f"{1e3 * report.seconds[n]:.1f}" for n in names)]]
    tables = [
        *_separation_tables(report, dict(zip(kinds, kinds, strict=True)), of),
        (f"images flagged at the threshold{evaded}, in %", ["", *names], rates + times),
    ]
    if len(damage) > 1:
        whole = [[*row, *[""] * (1 + len(names) - len(row))] for row in damage]
        tables.append((f"what attackers leave of the model, {report.figure}", ["", *names], whole))
    return tables
