"""Tables as text: Markdown for documents, columns for a terminal, CSV for other programs.

A table is its head and its rows. `align` has a letter for each column, l or r; its last letter
holds for the columns beyond it, so that "lr" is a name and numbers.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

Row = Sequence[Any]
RULES = {"l": "---", "r": "---:"}


def markdown_table(head: Row, rows: Iterable[Row], *, align: str = "l") -> str:
    """A Markdown table, without a last newline; cells are made one line, and their bars escaped.

    Raises ValueError for a row of another length than the head.
    """
    lines = [_line(head), "|" + "|".join(RULES[side] for side in _sides(align, len(head))) + "|"]
    for row in rows:
        _check_length(row, head)
        lines.append(_line(row))
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """Text of any kind for a Markdown document, in which it shall stand as it is."""
    return text.replace("\\", "\\\\").replace("<", "&lt;")


def terminal_table(head: Row, rows: Iterable[Row], *, align: str = "l") -> str:
    """Columns as wide as their widest cell, two spaces apart; no last newline, no trailing space.

    Raises ValueError for a row of another length than the head.
    """
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    for row in cells:
        _check_length(row, head)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pads = [str.rjust if side == "r" else str.ljust for side in _sides(align, len(head))]
    lines = (
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def csv_table(head: Row, rows: Iterable[Row]) -> str:
    """CSV with plain values, and lines that end in a newline; None is an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        _check_length(row, head)
        writer.writerow(row)
    return stream.getvalue()


def _line(row: Row) -> str:
    return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |"


def _sides(align: str, columns: int) -> str:
    return (align + align[-1] * columns)[:columns]


def _check_length(row: Row, head: Row) -> None:
    if len(row) != len(head):
        raise ValueError(f"a row of {len(row)} cells under a head of {len(head)}: {row!r:.120}")
