"""Reads metadata.jsonl and metadata.csv row by row, so that a message can name the file, the line and the reason."""

import csv
import json
import os
from dataclasses import dataclass, field

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


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
    for place, row, problem in read_lines(file):
        if not problem and not isinstance(row.get("file_name"), str):
            problem = "it has no file_name"
        yield place, row, problem


def read_lines(file: str):
    """As `read_rows`, for rows of any columns, also in a .tsv or in the list of a .json."""
    ending = os.path.splitext(file)[1].lower()
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        if ending == ".json":
            rows = _json_list(lines)
        else:
            rows = _csv_rows(lines, DELIMITERS[ending]) if ending in DELIMITERS else _json_rows(lines)
        for number, row, problem in rows:
            yield f"{file} {'row' if ending == '.json' else 'line'} {number}", row, problem


def _json_list(lines):
    try:
        rows = json.load(lines)
    except json.JSONDecodeError as error:
        yield 1, {}, f"it is not JSON: {error}"
        return
    if not isinstance(rows, list):
        yield 1, {}, "it is no list of rows"
        return
    for number, row in enumerate(rows, 1):
        yield (number, row, "") if isinstance(row, dict) else (number, {}, "it is not a row such as {…}")


def _csv_rows(lines, delimiter):
    reader = csv.DictReader(lines, delimiter=delimiter)
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
