"""Tables as text."""

from collections.abc import Mapping, Sequence

__all__ = ["Grid", "grid", "markdown"]

Grid = tuple[list[str], list[list[str]]]
"""Headings, and the cells of each row."""


def grid(columns: Mapping[str, Mapping[str, str]]) -> Grid:
    """Headings and rows of ``[column][row]`` texts; the other way round where there are many columns."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    if len(columns) <= 4:
        return ["", *columns], rows
    headings, *turned = (list(line) for line in zip(["", *columns], *rows, strict=True))
    return headings, turned


def markdown(
    tables: Sequence[tuple[str, list[str], list[list[str]]]], warnings: Sequence[str] = (), footnote: str = ""
) -> str:
    """Tables, each with its title, then a footnote and warnings, as Markdown."""
    parts = []
    for title, headings, rows in tables:
        lines = [headings, ["---"] * len(headings), *rows]
        parts.append(title + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    parts += [f"\\{footnote}\n"] if footnote else []
    parts += [f"Warning: {warning}\n" for warning in warnings]
    return "\n".join(parts)
