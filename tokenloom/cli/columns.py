"""Tables that stay readable on a narrow terminal: columns that do not fit go below, under the same keys.

Knows numbers and widths, not what they are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

GAP = 2
"""Cells between two columns."""
KEY_CELLS_MIN = 8
DASH = "–"

Cell = str | Text


@dataclass(frozen=True)
class Column:
    """One column. `key`: it names the row, and is shown again wherever the row goes on."""

    title: str
    right: bool = True
    key: bool = False


def fold(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int) -> list[Table]:
    """The rows as one table, or as several of `width` cells at most with the keys in each."""
    keys = [index for index, column in enumerate(columns) if column.key]
    widths = _widths(columns, rows)
    for index in keys:
        widths[index] = min(widths[index], max(width // (2 * len(keys)) - GAP, KEY_CELLS_MIN))
    parts: list[list[int]] = []
    used = 0
    for index in range(len(columns)):
        if index in keys:
            continue
        if not parts or used + GAP + widths[index] > width:
            parts.append([])
            used = sum(widths[key] for key in keys) + GAP * (len(keys) - 1)
        parts[-1].append(index)
        used += GAP + widths[index]
    return [_table(columns, rows, keys, part, widths) for part in parts]


def packed(items: Sequence[Cell], width: int) -> Text:
    """Items side by side, on as many lines as they need; none is broken."""
    text, used = Text(), 0
    for item in items:
        cells = cell_len(str(item))
        if used and used + GAP + cells > width:
            text.append("\n")
            used = 0
        elif used:
            text.append(" " * GAP)
            used += GAP
        text.append(item)
        used += cells
    return text


def count(number: float) -> str:
    """`1,234`, `123k`, `12.3M`: at most six characters up to a billion."""
    if number < 100_000:
        return f"{number:,.0f}"
    if number < 10_000_000:
        return f"{number / 1e3:,.0f}k"
    return f"{number / 1e6:,.1f}M"


def rate(per_s: float | None) -> str:
    """A number a second; a dash when it is not known."""
    if per_s is None:
        return DASH
    return f"{per_s:.1f}" if per_s < 100 else count(per_s)


def duration(seconds: float) -> str:
    """`120 ms`, `1.2 s`, `2m05s`, `3h07m`; a dash for what is no time."""
    if not isfinite(seconds):
        return DASH
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def share(part: float | None) -> str:
    """`62%`; a dash when it is not known."""
    return DASH if part is None else f"{part:.0%}"


def bar(part: float, cells: int) -> str:
    """`█████░░░`."""
    full = round(min(max(part, 0.0), 1.0) * cells)
    return "█" * full + "░" * (cells - full)


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> list[int]:
    return [
        max([cell_len(column.title), *(cell_len(str(row[index])) for row in rows)])
        for index, column in enumerate(columns)
    ]


def _table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    keys: Sequence[int],
    part: Sequence[int],
    widths: Sequence[int],
) -> Table:
    shown = [*keys, *part]
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for index in shown:
        column = columns[index]
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            width=widths[index],
        )
    for row in rows:
        if any(str(row[index]) for index in part):
            table.add_row(*(row[index] for index in shown))
    return table
