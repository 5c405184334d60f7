"""A folder of images with a metadata.jsonl or metadata.csv: its samples, in the order of their paths.

What a start finds out is kept in a cache folder, and the next start reads it from there if a walk through the folder
shows that no file has changed since. The images themselves are not opened here.
"""

import os
import posixpath
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import compute

from ppdiffusers_train.data.arrow_files import as_stamps, is_written, read_table, taken, write_table
from ppdiffusers_train.data.folder_files import Listing, is_image, list_files
from ppdiffusers_train.data.metadata import Problems, read_rows
from ppdiffusers_train.data.rows import Rows, as_captions, content_digest
from ppdiffusers_train.errors import BadSampleError, UserError

SPLITS = ("train", "validation", "test")  # folders at the top that stand for splits; the first one is trained
SCHEMA = pyarrow.schema(
    {
        "name": pyarrow.large_binary(),  # relative to the folder, with "/"; a name may be no valid text
        "size": pyarrow.int64(),
        "stamp": pyarrow.binary(16),
        "captions": pyarrow.large_list(pyarrow.large_string()),
        "problem": pyarrow.large_string(),  # why there is no caption
    }
)
METADATA_SCHEMA = pyarrow.schema([SCHEMA.field(name) for name in ("name", "captions", "problem")])
VERSION = 1  # of what the table holds
ROWS_AT_ONCE = 10_000
NOTES = b"notes"  # on files that are not used


class FolderRows(Rows):
    """The samples of an image folder.

    Args:
        folder: its path.
        table: a table with the columns of `SCHEMA`.
        chosen: which of its rows, an int64 array.
    """

    def __init__(self, folder: str, table, caption_column: str, chosen=None):
        super().__init__(caption_column)
        self.folder, self.table = folder, table
        self.chosen = np.arange(len(table)) if chosen is None else chosen

    def __len__(self):
        return len(self.chosen)

    def select(self, indices):
        chosen = FolderRows(self.folder, self.table, self.caption_column, self.chosen[indices])
        chosen.background = self.background
        return chosen

    def _value(self, column: str, index: int):
        return self.table[column][int(self.chosen[index])].as_py()

    def _values(self, column: str, start: int, stop: int):
        return self.table[column].take(pyarrow.array(self.chosen[start:stop]))

    def name(self, index: int) -> str:
        return f"{self.location(index)} (row {index})"

    def location(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self._value("name", index)))

    def captions(self, index: int) -> list:
        problem = self._value("problem", index)
        if problem:
            raise BadSampleError(f"{self.name(index)}: {problem}")
        return self._value("captions", index)

    def stored_captions(self, start: int, stop: int) -> list:
        lists = self._values("captions", start, stop).to_pylist()
        return [texts[0] if texts and len(texts) == 1 else texts for texts in lists]

    def stored_names(self, start: int, stop: int) -> list:
        return list(map(os.fsdecode, self._values("name", start, stop).to_pylist()))

    def stored_sizes(self, start: int, stop: int) -> list:
        return self._values("size", start, stop).to_pylist()

    def source_digest(self) -> str:
        return source_digest(self.folder)

    def stamps(self) -> np.ndarray:
        return as_stamps(self._values("stamp", 0, len(self)))

    def all_stamps(self) -> np.ndarray:
        return as_stamps(self.table["stamp"])


def source_digest(folder: str) -> str:
    """The name of a folder's place in the cache of indices."""
    return content_digest(os.path.realpath(folder).encode()).hex()


def build_folder(args, listing: Listing, index_dir: Path) -> FolderRows:
    """The samples of `--train_data_dir`, from the cache in `index_dir` if no file has changed.

    Raises:
        UserError: there is no usable metadata, or an image has no row in it.
    """
    folder, column = args.train_data_dir, args.caption_column
    identity = {"version": VERSION, "files": listing.digest, "columns": [args.image_column, column]}
    file = index_dir / source_digest(folder) / f"rows-{content_digest(column.encode()).hex()[:8]}.arrow"
    if is_written(file, identity):
        table = read_table(file)
    else:
        rows, problems = open_folder(folder, column, Problems(), listing)
        refuse(folder, args.image_column, rows, problems)
        notes = "\n".join(f"{folder}: not used: {problems.describe(kind)}" for kind in problems.found)
        table = write_table(file, rows.table.replace_schema_metadata({NOTES: notes}), identity)
    notes = table.schema.metadata[NOTES].decode()
    if notes and os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
        print(notes)
    return FolderRows(folder, table, column)


def refuse(folder: str, image_column: str, rows: FolderRows, problems: Problems) -> None:
    """Raise a `UserError` if training cannot use a folder."""
    flag, columns = (
        f"--train_data_dir: {folder!r}",
        ["image", *(name for name in problems.columns if name != "file_name")],
    )
    if "no_metadata" in problems:
        raise UserError(
            f"{flag} has no metadata.jsonl; expected one line per image, such as "
            '{"file_name": "cat.jpg", "text": "a cat on a chair"}'
        )
    for kind in ("bad_metadata", "unmentioned"):
        if kind in problems:
            raise UserError(f"{flag}: {problems.describe(kind)}")
    for name, column in (("--image_column", image_column), ("--caption_column", rows.caption_column)):
        if column not in columns:
            raise UserError(f"{name}: {folder!r} has no column {column!r}; it has {', '.join(columns)}")
    if image_column != "image":
        raise UserError(f"--image_column: column {image_column!r} of {folder!r} does not hold images")
    if not len(rows):
        raise UserError(f"{flag} has no samples")
    mistaken = compute.invert(
        compute.match_substring(rows.table["problem"], "holds None")
    )  # a missing one is no mistake
    if compute.all(compute.fill_null(mistaken, False)).as_py():
        problem = rows.table["problem"][0].as_py().partition(" holds ")[2]
        raise UserError(f"--caption_column: column {rows.caption_column!r} of {folder!r} holds {problem}")


def open_folder(folder: str, caption_column: str, problems: Problems, listing=None) -> tuple:
    """(`FolderRows` of the images that have a row in the metadata, the `Problems` of all other images and rows).

    An image's row is in the nearest metadata file, in its folder or above it. Several rows of an image are several
    captions. Where there is a folder `train` at the top, only the images in it are used.
    """
    listing = listing or list_files(folder)
    if not listing.metadata:
        problems.add("no_metadata", folder)
    trained = trained_images(folder, listing.names, problems)
    metadata = read_metadata(folder, listing, caption_column, problems)
    return FolderRows(folder, find_rows(folder, listing, trained, metadata, problems), caption_column), problems


def trained_images(folder: str, names, problems: Problems) -> np.ndarray:
    """Whether each image is trained, by the folder at the top that it is in: bool [n]."""

    def within(split):
        return np.asarray(compute.starts_with(names, f"{split}/"), bool)

    train, *others = map(within, SPLITS)
    trained = train if train.any() else ~np.any(others, axis=0)
    for name in names.filter(pyarrow.array(~trained)).to_pylist():
        where = f"it is not in {SPLITS[0]}/, but in another folder" if train.any() else "it is in a folder of that name"
        problems.add("other_split", f"{os.path.join(folder, os.fsdecode(name))}: {where}")
    return trained


def read_metadata(folder: str, listing: Listing, caption_column: str, problems: Problems) -> dict:
    """{folder of a metadata file: table of its rows}, with names relative to `folder`."""
    parts = {}
    for file in listing.metadata:
        here, rows = posixpath.dirname(file), {name: [] for name in METADATA_SCHEMA.names}
        batches = parts.setdefault(here, [])
        for place, row, problem in read_rows(os.path.join(folder, file)):
            if problem:
                problems.add("bad_metadata", f"{place}: {problem}")
                continue
            problems.columns.update(dict.fromkeys(row))
            captions, problem = usable_captions(row.get(caption_column), caption_column)
            path = relative_path(here, row["file_name"]).encode(errors="surrogateescape")
            for values, value in zip(rows.values(), (path, captions, problem)):
                values.append(value)
            if len(rows["name"]) == ROWS_AT_ONCE:
                batches.append(pyarrow.RecordBatch.from_pydict(rows, METADATA_SCHEMA))
                rows = {name: [] for name in rows}
        batches.append(pyarrow.RecordBatch.from_pydict(rows, METADATA_SCHEMA))
    return {here: pyarrow.Table.from_batches(batches, METADATA_SCHEMA) for here, batches in parts.items()}


def usable_captions(value, column: str) -> tuple:
    """(list of captions, None), or (None, why the value is no caption)."""
    try:
        captions = as_captions(value, "", column)
        "".join(captions).encode()
    except BadSampleError as error:
        return None, str(error).removeprefix(": ")
    except UnicodeEncodeError:
        return None, f"column {column!r} holds half of a surrogate pair; expected valid Unicode"
    return captions, None


def relative_path(here: str, name: str) -> str:
    """The path of a row's image, relative to the folder of the data."""
    name = posixpath.join(here, name.replace("\\", "/"))
    return posixpath.normpath(name) if "./" in name or "//" in name else name


def merged(table):
    """A metadata table in which each image has one row, with the captions of all its rows."""
    rows = {}
    for row in table.to_pylist():
        known = rows.setdefault(row["name"], row)
        if known is not row and row["captions"]:
            known.update(captions=[*(known["captions"] or ()), *row["captions"]], problem=None)
    return pyarrow.Table.from_pylist(list(rows.values()), METADATA_SCHEMA)


def nearest_folders(names, folders: list) -> np.ndarray:
    """For each image the number of the nearest of `folders` at or above it, or -1: int64 [n]."""
    nearest = np.full(len(names), -1)
    for number in sorted(range(len(folders)), key=lambda number: len(folders[number])):  # the deepest one comes last
        prefix = folders[number] and folders[number] + "/"
        nearest[np.asarray(compute.starts_with(names, os.fsencode(prefix)), bool)] = number
    return nearest


def find_rows(folder: str, listing: Listing, trained: np.ndarray, metadata: dict, problems: Problems):
    """The table of the trained images that have a row; the other images and rows are added to `problems`."""
    names, known, start = listing.names, np.full(len(listing.names), -1), 0  # known: place in all metadata tables
    nearest, lost, tables = nearest_folders(names, list(metadata)), {}, []
    for number, (here, table) in enumerate(metadata.items()):
        images = np.flatnonzero(nearest == number)
        places, is_lost = match(names.take(pyarrow.array(images)), table["name"])
        lost_names = table["name"].filter(pyarrow.array(is_lost))
        if compute.any(compute.is_in(lost_names, table["name"].filter(pyarrow.array(~is_lost)))).as_py():
            table = merged(table)  # several rows are about one image
            places, is_lost = match(names.take(pyarrow.array(images)), table["name"])
            lost_names = table["name"].filter(pyarrow.array(is_lost))
        known[images] = np.where(places >= 0, places + start, -1)
        lost[here] = set(lost_names.to_pylist())
        tables.append(table)
        start += len(table)
    for i in np.flatnonzero(trained & (known < 0)).tolist():
        where = os.path.normpath(os.path.join(folder, list(metadata)[nearest[i]] if nearest[i] >= 0 else ""))
        path = os.path.join(folder, os.fsdecode(names[i].as_py()))
        problems.add("unmentioned", f"{path}: no row of the metadata in {where} is about it")
    add_lost_rows(folder, listing, lost, problems)
    used = np.flatnonzero(trained & (known >= 0))
    captions = taken(pyarrow.concat_tables([METADATA_SCHEMA.empty_table(), *tables]), known[used])
    stamps = pyarrow.py_buffer(bytes(listing.stamps))
    stamps = pyarrow.FixedSizeBinaryArray.from_buffers(pyarrow.binary(16), len(names), [None, stamps])
    columns = {"name": names, "size": pyarrow.array(listing.sizes, pyarrow.int64()), "stamp": stamps}
    images = taken(pyarrow.Table.from_pydict(columns, pyarrow.schema([SCHEMA.field(name) for name in columns])), used)
    columns = [*images.columns, captions["captions"], captions["problem"]]
    return pyarrow.Table.from_arrays(columns, schema=SCHEMA)


def match(names, described) -> tuple:
    """(for each of `names` its place in the column `described` or -1, for each of `described` whether it has none)."""
    places = compute.index_in(names, described.combine_chunks())
    places = places.fill_null(-1).to_numpy(zero_copy_only=False)
    is_lost = np.ones(len(described), bool)
    is_lost[places[places >= 0]] = False
    return places, is_lost


def add_lost_rows(folder: str, listing: Listing, lost: dict, problems: Problems) -> None:
    """Add the rows of metadata that belong to no image to `problems`. `lost` is {folder: their names}."""
    for file in listing.metadata:
        here = posixpath.dirname(file)
        for place, row, problem in read_rows(os.path.join(folder, file)) if lost[here] else ():
            name = "" if problem else relative_path(here, row["file_name"])
            path = os.path.join(folder, name)
            if problem or os.fsencode(name) not in lost[here]:
                continue
            if not os.path.exists(path):
                problems.add("lost_row", f"{place}: there is no file {path}")
            elif is_image(name):
                problems.add("lost_row", f"{place}: {path} has metadata that is nearer")
            else:
                problems.add("lost_row", f"{place}: {path} is no image to the loader, by its extension")
