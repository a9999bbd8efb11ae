"""Notebooks as Markdown, so that they are tested as documents are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LANGUAGES = {"%%bash": "bash", "%%writefile": "yaml"}


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    """The cells, each with its whole source as one text."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


def language_and_code(source: str) -> tuple[str, str]:
    """What a code cell is written in, and its text without the line of a cell magic."""
    magic, _, rest = source.partition("\n")
    language = LANGUAGES.get(magic.split()[0]) if magic.startswith("%%") else None
    return (language, rest) if language else ("python", source)


def as_markdown(notebook: Path) -> str:
    """The notebook as a document: its text, and its code as fenced blocks."""
    parts = []
    for cell in cells_of(notebook):
        if cell["cell_type"] == "markdown":
            parts.append(cell["source"])
        else:
            language, code = language_and_code(cell["source"])
            parts.append(f"```{language}\n{code}\n```")
    return "\n\n".join(parts) + "\n"
