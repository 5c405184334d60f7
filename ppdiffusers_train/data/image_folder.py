"""A folder of images with a metadata.jsonl or metadata.csv: its samples, in the order of their paths.

What a start finds out is kept in a cache folder, and the next start reads it from there if a walk through the folder
shows that no file has changed since. The images themselves are not opened here.
"""

import functools
import hashlib
import os
import posixpath
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import compute

from ppdiffusers_train.data.arrow_files import as_stamps, is_written, read_table, write_table
from ppdiffusers_train.data.metadata import METADATA_FILES, read_rows
from ppdiffusers_train.data.rows import Rows, as_captions, content_digest, stamp_of
from ppdiffusers_train.errors import BadSampleError, UserError

SPLITS = ("train", "validation", "test")  # folders at the top that stand for splits; the first one is trained
SCHEMA = pyarrow.schema(
    {
        "name": pyarrow.large_string(),  # relative to the folder, with "/"
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
        return FolderRows(self.folder, self.table, self.caption_column, self.chosen[indices])

    def _value(self, column: str, index: int):
        return self.table[column][int(self.chosen[index])].as_py()

    def _values(self, column: str, start: int, stop: int):
        return self.table[column].take(pyarrow.array(self.chosen[start:stop]))

    def name(self, index: int) -> str:
        return f"{self.location(index)} (row {index})"

    def location(self, index: int) -> str:
        return os.path.join(self.folder, self._value("name", index))

    def captions(self, index: int) -> list:
        problem = self._value("problem", index)
        if problem:
            raise BadSampleError(f"{self.name(index)}: {problem}")
        return self._value("captions", index)

    def stored_captions(self, start: int, stop: int) -> list:
        lists = self._values("captions", start, stop).to_pylist()
        return [texts[0] if texts and len(texts) == 1 else texts for texts in lists]

    def stored_names(self, start: int, stop: int) -> list:
        return self._values("name", start, stop).to_pylist()

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


@functools.cache
def extensions() -> frozenset:
    """The extensions of files that are images: all that Pillow can read."""
    Image.init()
    return frozenset(extension for extension, form in Image.EXTENSION.items() if form in Image.OPEN)


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its extension."""
    return posixpath.splitext(name)[1].lower() in extensions()


@dataclass
class Listing:
    """The files of a folder, in the order of their paths, which are relative to it.

    `names`, `sizes` and `stamps` are of the images; `metadata` has the paths of metadata files, `has_archives` is whether
    there are zip files. `digest` changes when any of these files does.
    """

    names: list = field(default_factory=list)
    sizes: list = field(default_factory=list)
    stamps: bytearray = field(default_factory=bytearray)
    metadata: list = field(default_factory=list)
    has_archives: bool = False
    digest: str = ""


def list_files(folder: str) -> Listing:
    """Walk through a folder: links are followed, hidden files and folders left out. Files are not opened."""
    listing, digest = Listing(), hashlib.blake2b(digest_size=16)
    known = extensions()
    for name, entry in walk(folder, "", ()):
        ending = posixpath.splitext(name)[1].lower()
        if ending in known:
            stat = entry.stat()
            stamp = stamp_of(stat)
            listing.names.append(name)
            listing.sizes.append(stat.st_size)
            listing.stamps += stamp
        elif entry.name in METADATA_FILES:
            listing.metadata.append(name)
            stamp = stamp_of(entry.stat())
        else:
            listing.has_archives |= ending == ".zip"
            continue
        digest.update(name.encode(errors="surrogateescape") + stamp)
    listing.digest = digest.hexdigest()
    return listing


def walk(folder: str, prefix: str, above: tuple):
    """Yield (relative path, `os.DirEntry`) of the files in a folder and below, sorted by path.

    Args:
        prefix: relative path of this folder, ending in "/" unless it is empty.
        above: (device, inode) of the folders around it: a link to one of them is not followed.
    """
    stat = os.stat(folder)
    above = (*above, (stat.st_dev, stat.st_ino))
    with os.scandir(folder) as entries:
        found = [(entry.name + "/" if entry.is_dir() else entry.name, entry) for entry in entries]
    for name, entry in sorted(found, key=lambda pair: pair[0]):
        if name.startswith("."):
            continue
        if not name.endswith("/"):
            if entry.is_file():  # false for a link that leads nowhere
                yield prefix + name, entry
        elif not name.startswith("__"):
            target = entry.stat()
            if (target.st_dev, target.st_ino) not in above:
                yield from walk(entry.path, prefix + name, above)


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


def open_folder(folder: str, caption_column: str, problems: Problems, listing=None) -> tuple:
    """(`FolderRows` of the images that have a row in the metadata, the `Problems` of all other images and rows).

    An image's row is in the nearest metadata file, in its folder or above it. Several rows of an image are several
    captions. Where there is a folder `train` at the top, only the images in it are used.
    """
    listing = listing or list_files(folder)
    if not listing.metadata:
        problems.add("no_metadata", folder)
    names = pyarrow.array(listing.names, pyarrow.large_string())
    tops = compute.list_element(compute.split_pattern(names, "/", max_splits=1), 0) if len(names) else names
    splits = compute.and_(compute.is_in(tops, pyarrow.array(SPLITS, tops.type)), compute.match_substring(names, "/"))
    trained = compute.invert(splits)
    if compute.any(compute.and_(splits, compute.equal(tops, SPLITS[0]))).as_py():
        trained = compute.equal(tops, SPLITS[0])
    for name in names.filter(compute.invert(trained)).to_pylist():
        problems.add("other_split", f"{os.path.join(folder, name)}: it is not in {SPLITS[0]}/, but in another folder")
    metadata = read_metadata(folder, listing, caption_column, problems)
    nearest = nearest_folders(listing.names, {posixpath.dirname(file) for file in listing.metadata})
    table = find_rows(folder, listing, names, trained, nearest, metadata, problems)
    return FolderRows(folder, table, caption_column), problems


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
            for values, value in zip(rows.values(), (relative_path(here, row["file_name"]), captions, problem)):
                values.append(value)
            if len(rows["name"]) == ROWS_AT_ONCE:
                batches.append(pyarrow.RecordBatch.from_pydict(rows, METADATA_SCHEMA))
                rows = {name: [] for name in rows}
        batches.append(pyarrow.RecordBatch.from_pydict(rows, METADATA_SCHEMA))
    return {here: joined(pyarrow.Table.from_batches(batches, METADATA_SCHEMA)) for here, batches in parts.items()}


def usable_captions(value, column: str) -> tuple:
    """(list of captions, None), or (None, why the value is no caption)."""
    try:
        return as_captions(value, "", column), None
    except BadSampleError as error:
        return None, str(error).removeprefix(": ")


def relative_path(here: str, name: str) -> str:
    """The path of a row's image, relative to the folder of the data."""
    name = posixpath.join(here, name.replace("\\", "/"))
    return posixpath.normpath(name) if "./" in name or "//" in name else name


def joined(table):
    """A metadata table in which each image has one row, with the captions of all its rows."""
    names = table["name"]
    if compute.count_distinct(names).as_py() == len(table):
        return table.combine_chunks()
    rows = {}
    for row in table.to_pylist():
        known = rows.setdefault(row["name"], row)
        if known is not row and row["captions"]:
            known.update(captions=[*(known["captions"] or ()), *row["captions"]], problem=None)
    return pyarrow.Table.from_pylist(list(rows.values()), METADATA_SCHEMA)


def nearest_folders(names: list, folders: set) -> list:
    """For each image the nearest of `folders` at or above it, or None."""

    @functools.cache
    def nearest(folder: str):
        if folder in folders or not folder:
            return folder if folder in folders else None
        return nearest(posixpath.dirname(folder))

    return [nearest(posixpath.dirname(name)) for name in names]


def find_rows(folder: str, listing: Listing, names, trained, nearest: list, metadata: dict, problems: Problems):
    """The table of the trained images that have a row; the other images and rows are added to `problems`."""
    known = np.full(len(names), -1, np.int64)  # place in the concatenated metadata tables
    start, nearest, trained = 0, np.array(nearest, dtype=object), np.asarray(trained, dtype=bool)
    for here, table in metadata.items():
        images = np.flatnonzero(nearest == here)
        places = compute.index_in(names.take(pyarrow.array(images)), table["name"].combine_chunks())
        known[images] = np.where(places.is_null(), -1, places.fill_null(0).to_numpy(zero_copy_only=False) + start)
        lost = np.ones(len(table), bool)
        lost[known[images][known[images] >= 0] - start] = False
        for name in table["name"].filter(pyarrow.array(lost)).to_pylist():
            problems.add("lost_row", lost_row(folder, here, name))
        start += len(table)
    for i in np.flatnonzero(trained & (known < 0)).tolist():
        where = os.path.join(folder, nearest[i] or "")
        path = os.path.join(folder, listing.names[i])
        problems.add("unmentioned", f"{path}: no row of the metadata in {where} is about it")
    used = np.flatnonzero(trained & (known >= 0))
    captions = pyarrow.concat_tables(metadata.values()) if metadata else METADATA_SCHEMA.empty_table()
    captions = captions.take(pyarrow.array(known[used]))
    stamps = pyarrow.FixedSizeBinaryArray.from_buffers(
        pyarrow.binary(16), len(names), [None, pyarrow.py_buffer(bytes(listing.stamps))]
    )
    columns = {"name": names, "size": pyarrow.array(listing.sizes, pyarrow.int64()), "stamp": stamps}
    columns = {name: column.take(pyarrow.array(used)) for name, column in columns.items()}
    columns |= {name: captions[name].combine_chunks() for name in ("captions", "problem")}
    return pyarrow.Table.from_pydict(columns, SCHEMA)


def lost_row(folder: str, here: str, name: str) -> str:
    """Why a row of the metadata in the folder `here` belongs to no image."""
    path = os.path.join(folder, name)
    row = f"{os.path.join(folder, here)}: the row of {path}"
    if not os.path.exists(path):
        return f"{row}: there is no such file"
    return f"{row}: it is no image by its extension, or has metadata that is nearer"
