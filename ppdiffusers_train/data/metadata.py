"""Reads metadata.jsonl and metadata.csv row by row, so that a message can name the file, the line and the reason."""

import csv
import json
from dataclasses import dataclass, field

METADATA_FILES = ("metadata.jsonl", "metadata.csv")


@dataclass
class Problems:
    """What is wrong with the files of a folder: {kind: [number, first texts]}, with kinds of `tools.check.KINDS`."""

    kept: object = 3  # texts of each kind; None keeps all
    found: dict = field(default_factory=dict)
    columns: dict = field(default_factory=dict)  # of the metadata, as keys

    def add(self, kind: str, text: str) -> None:
        """Add a problem with its text."""
        count = self.found.setdefault(kind, [0, []])
        count[0] += 1
        if self.kept is None or len(count[1]) < self.kept:
            count[1].append(text)

    def __contains__(self, kind: str) -> bool:
        return kind in self.found

    def describe(self, kind: str) -> str:
        """The first problem of a kind, and how many others there are."""
        count, texts = self.found[kind]
        return texts[0] + (f" (and {count - 1} more)" if count > 1 else "")


def read_rows(file: str):
    """Yield (place, row as a dictionary, problem) of each row of a .jsonl or .csv. Blank lines are skipped."""
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        for number, row, problem in _csv_rows(lines) if file.endswith(".csv") else _json_rows(lines):
            if not problem and not isinstance(row.get("file_name"), str):
                problem = "it has no file_name"
            yield f"{file} line {number}", row, problem


def _csv_rows(lines):
    reader = csv.DictReader(lines)
    for row in reader:
        yield reader.line_num, {name: value or None for name, value in row.items()}, ""  # an empty field is no value


def _json_rows(lines):
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row, problem = None, 'it is not a row such as {"file_name": …}'
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"it is not JSON: {error}"
        yield (number, row, "") if isinstance(row, dict) else (number, {}, problem)
