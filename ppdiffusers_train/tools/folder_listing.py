"""Lists a folder of images file by file, to name what `datasets` refuses as a whole or leaves out silently.

`datasets` takes the images of the split `train`, gives each its row of the nearest metadata file, and refuses the
folder when one has none. Folders and files whose names contain words such as `test` it takes for other splits.
"""

import csv
import json
import os
from pathlib import Path

from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ppdiffusers_train.data.image_folder import METADATA_FILES
from ppdiffusers_train.data.rows import as_captions

EXTENSIONS = frozenset(ImageFolder.EXTENSIONS)


class ListedRows:
    """Rows that were found one by one, with the methods of `Rows` that checking needs.

    Args:
        entries: a list of (name, path of the image, caption as stored).
        caption_column: name of the captions' column, for messages.
    """

    def __init__(self, entries: list, caption_column: str):
        self.entries, self.caption_column = entries, caption_column

    def __len__(self):
        return len(self.entries)

    def name(self, index: int) -> str:
        """The name of row `index` in messages."""
        return self.entries[index][0]

    def location(self, index: int) -> str:
        """The path of the image of row `index`."""
        return self.entries[index][1]

    def captions(self, index: int) -> list:
        """The captions of row `index`.

        Raises:
            BadSampleError: there is none, or it is no text.
        """
        name, _, caption = self.entries[index]
        return as_captions(caption, name, self.caption_column)


def list_folder(folder, caption_column: str) -> tuple:
    """The rows of an image folder, and the problems of its files and metadata.

    Returns:
        (`ListedRows` of the images that have a row, in the order of `datasets`; a list of (kind, text), with kinds
        of `check.KINDS`)
    """
    folder = os.path.abspath(folder)
    files = list(walk(folder))
    splits = split_of_files(folder)
    problems, metadata = [], {}  # metadata: {its folder: {path of an image: (where the row stands, its caption)}}
    for file in files:
        if os.path.basename(file) in METADATA_FILES:
            rows, found = read_metadata(file, caption_column)
            metadata.setdefault(os.path.dirname(file), {}).update(rows)
            problems += found
    entries, used = [], set()
    for path in (path for path, split in splits.items() if split == "train" and is_image(path)):
        nearest = next((str(parent) for parent in Path(path).parents if str(parent) in metadata), None)
        if path in metadata.get(nearest, {}):
            used.add((nearest, path))
            entries.append((f"{path} (row {len(entries)})", path, metadata[nearest][path][1]))
        else:
            problems.append(("unmentioned", f"{path}: no row of the metadata in {nearest or folder} is about it"))
    for path in (path for path in files if is_image(path) and splits.get(path) != "train"):
        if path in splits:
            problems.append(("other_split", f"{path}: its name makes it one of the split {splits[path]!r}"))
        else:
            problems.append(("no_split", f"{path}: other names have the word train or test in them, its own has not"))
    images = set(filter(is_image, files))
    for nearest, rows in metadata.items():
        for path, (place, _) in rows.items():
            if (nearest, path) in used or (path in images and splits.get(path) != "train"):
                continue  # reported with the image
            if path in images:
                problems.append(("lost_row", f"{place}: {path} has metadata that is nearer"))
            elif os.path.exists(path):
                problems.append(("lost_row", f"{place}: {path} is no image to the loader, by its extension or place"))
            else:
                problems.append(("lost_row", f"{place}: there is no file {path}"))
    return ListedRows(entries, caption_column), problems


def walk(folder: str):
    """Yield the paths of the files in a folder and below, without hidden ones."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        yield from (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))


def is_image(path: str) -> bool:
    """Whether the loader of image folders treats a file as an image: that depends on the extension."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def split_of_files(folder: str) -> dict:
    """{path: split} of all files that `datasets` finds in a folder, in its order."""
    try:
        files = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)
    except EmptyDatasetError:
        return {}
    return {path: str(split) for split, paths in reversed(files.items()) for path in paths}


def read_metadata(file: str, caption_column: str) -> tuple:
    """({path of an image: (where its row stands, its caption)}, [(kind, text)]) of a metadata file."""
    rows, problems = {}, []
    for place, row, problem in read_rows(file):
        if problem:
            problems.append(("bad_metadata", f"{place}: {problem}"))
            continue
        path = os.path.normpath(os.path.join(os.path.dirname(file), row["file_name"]))
        if path in rows:
            problems.append(("lost_row", f"{rows[path][0]}: {place} is about the same image"))
        rows[path] = (place, row.get(caption_column))
    return rows, problems


def read_rows(file: str):
    """Yield (place, row as a dictionary, problem) of each row of a .jsonl or .csv."""
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        for number, row, problem in _csv_rows(lines) if file.endswith(".csv") else _json_rows(lines):
            if not problem and not isinstance(row.get("file_name"), str):
                problem = "it has no file_name"
            yield f"{file} line {number}", row, problem


def _csv_rows(lines):
    reader = csv.DictReader(lines)
    for row in reader:
        # An empty field is a missing value to `datasets`, not an empty text.
        yield reader.line_num, {name: value or None for name, value in row.items()}, ""


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
