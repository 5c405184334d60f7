"""Reads metadata.jsonl and metadata.csv row by row, so that a message can name the file, the line and the reason."""

import csv
import json
import os

from ppdiffusers_train.data.plain_text import decoded

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST_ROW = 1 << 24  # characters
SEPARATORS = {
    ",": "commas",
    ";": "semicolons",
    "\t": "tabs",
    "|": "bars",
}


class RowError(Exception):
    """A line with which reading a file ends: (its number, the reason)."""


def read_rows(file: str):
    """Yield (place, row as a dictionary, problem) of each row of a .jsonl or .csv. Blank lines are skipped."""
    for place, row, problem in read_lines(file):
        yield place, row, problem or _name_problem(row.get("file_name"))


def read_lines(file: str):
    """As `read_rows`, for rows of any columns, also in a .tsv or in the list of a .json."""
    ending = os.path.splitext(file)[1].lower()
    try:
        # Bytes that are not UTF-8 come as surrogates, so that `_lines` can name their line.
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as content:
            if ending == ".json":
                rows = _json_list(content)
            else:
                lines = _lines(content)
                rows = _csv_rows(lines, DELIMITERS[ending]) if ending in DELIMITERS else _json_rows(lines)
            for number, row, problem in rows:
                yield f"{file} {'row' if ending == '.json' else 'line'} {number}", row, problem
    except RowError as error:
        number, problem = error.args
        yield f"{file} line {number}", {}, problem
    except OSError as error:
        yield file, {}, f"it cannot be read: {error.strerror}"


def _json_list(content):
    text = content.read()
    try:
        decoded(text.encode("utf-8", "surrogateescape"))
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = str(error) if str(error).startswith("it ") else f"it is not JSON: {error}"
        yield 1, {}, problem
        return
    if not isinstance(rows, list):
        yield 1, {}, "it is not a list of rows"
        return
    for number, row in enumerate(rows, 1):
        yield (number, row, "") if isinstance(row, dict) else (number, {}, "it is not a row such as {…}")


def _name_problem(name) -> str:
    if not isinstance(name, str):
        return "it has no file_name"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return f"its file_name {name!r} is not valid text"
    return ""


def _lines(file):
    number = 0
    while line := file.readline(LONGEST_ROW):
        number += 1
        if len(line) == LONGEST_ROW:
            raise RowError(number, f"it has more than {LONGEST_ROW:,} characters")
        if not line.isascii() or "\0" in line:
            try:
                decoded(line.encode("utf-8", "surrogateescape"))
            except ValueError as error:
                raise RowError(number, str(error)) from error
        yield line


def _csv_rows(lines, delimiter: str):
    csv.field_size_limit(LONGEST_ROW)
    reader, header = csv.reader(lines, delimiter=delimiter, strict=True), None
    while True:
        number = reader.line_num + 1  # a row in quotes may have several lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise RowError(number, f"its double quotes are not in pairs, or a field is too long: {error}") from error
        if fields is None:
            return
        if not any(fields):
            continue
        if header is None:
            header = _csv_header(number, fields, delimiter)
        elif len(fields) > len(header):
            problem = f"it has {len(fields)} fields and the header has {len(header)}; a text with a comma needs quotes"
            yield number, {}, problem
        else:
            yield number, {name: value or None for name, value in zip(header, fields)}, ""  # empty: no value


def _csv_header(number: int, fields: list, delimiter: str) -> list:
    names = [name.strip() for name in fields]
    for separator, what in SEPARATORS.items():
        if len(names) == 1 and separator in names[0] and separator != delimiter:
            raise RowError(number, f"its columns are separated by {what}; expected {SEPARATORS[delimiter]}")
    for name in names:
        if name and names.count(name) > 1:
            raise RowError(number, f"the column {name!r} is there twice")
    return names


def _json_rows(lines):
    is_first = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row, problem = None, 'it is not a row such as {"file_name": …}'
        try:
            row = json.loads(line, object_pairs_hook=without_doubles)
        except json.JSONDecodeError as error:
            problem = f"it is not JSON: {error.msg} in column {error.colno}"
        except (ValueError, RecursionError) as error:
            problem = f"it is not JSON that can be read: {error}"
        if is_first and line.lstrip().startswith("["):
            raise RowError(number, 'it is a JSON array; expected one row per line, such as {"file_name": …}')
        is_first = False
        yield (number, row, "") if isinstance(row, dict) else (number, {}, problem)


def without_doubles(pairs: list) -> dict:
    """A JSON object from its (name, value) pairs. Raises a `ValueError` if a name is there twice."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return dict(pairs)
