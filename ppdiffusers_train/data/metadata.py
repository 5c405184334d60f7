"""Reads metadata.jsonl and metadata.csv row by row, so that a message can name the file, the line and the reason."""

import csv
import json

METADATA_FILES = ("metadata.jsonl", "metadata.csv")


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
