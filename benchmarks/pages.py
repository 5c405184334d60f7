"""What the pages of figures share: docs/NAME.json has the figures, a file here the text, with {marks} for tables."""

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def read_figures(name: str) -> dict:
    """The figures of docs/NAME.json; empty if there are none yet."""
    file = DOCS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def fill(template: str, parts: dict) -> str:
    """The text of a file of this folder, with each {mark} of `parts` replaced."""
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    for mark, part in parts.items():
        text = text.replace(f"{{{mark}}}", part)
    return text


def write_page(name: str, text: str) -> None:
    """Write docs/NAME.md."""
    (DOCS / f"{name}.md").write_text(text, encoding="utf-8")


def rows_of(cells: list) -> str:
    """Rows of a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def table(header: list, rows: list) -> str:
    """A table in Markdown; empty without rows."""
    return rows_of([header, ["---"] * len(header), *rows]) if rows else ""
