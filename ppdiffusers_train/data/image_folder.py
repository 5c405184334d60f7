"""A folder of images with captions: its samples, in the order of their paths.

What a start finds out is kept in a cache folder, and the next start reads it from there if a walk through the folder
shows that no file has changed since. The images themselves are not opened here.
"""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow

from ppdiffusers_train.data.arrow_files import as_stamps, is_written, read_table, write_table
from ppdiffusers_train.data.folder_captions import (
    FLAG,
    METADATA,
    TEXT,
    CaptionFlags,
    captioned_images,
)
from ppdiffusers_train.data.folder_files import Listing
from ppdiffusers_train.data.problems import Problems
from ppdiffusers_train.data.repeats import times_of
from ppdiffusers_train.data.rows import Rows, content_digest
from ppdiffusers_train.data.text_files import wait_until_changes_show
from ppdiffusers_train.errors import BadSampleError, UserError, one_line

VERSION = 3  # of the table's contents
UNUSED_KEY = b"unused"
ORIGINS = {METADATA: "metadata", TEXT: "text files", FLAG: "--caption"}
UNUSED = {  # kinds of `Problems` as the summary of a folder calls them, singular and plural
    "other_split": ("in a folder that is not trained",) * 2,
    "lost_row": ("row of metadata", "rows of metadata"),
    "mask": ("mask", "masks"),
    "unread_text": tuple(f"text {files} beside images that have another caption" for files in ("file", "files")),
    "lost_text": ("text file without an image", "text files without an image"),
    "dead_link": ("link that leads nowhere", "links that lead nowhere"),
    "other_file": ("other file", "other files"),
}
THREE_WAYS = (
    'expected a metadata.jsonl with a line per image, such as {"file_name": "cat.jpg", "text": "a cat on a chair"}, or '
    "a text file beside each image, such as cat.txt beside cat.jpg, or --caption TEXT for all images"
)


class FolderRows(Rows):
    """The samples of an image folder.

    Args:
        folder: its path.
        table: a table with the columns of `folder_captions.SCHEMA`.
        unused: `Problems` that name the files and rows of metadata that are not used.
        times: how often an epoch uses each image of the table, int64 [n], or None.
        chosen: which of its rows, an int64 array.
    """

    def __init__(self, folder: str, table, caption_column: str, unused: Problems, times=None, chosen=None):
        super().__init__(caption_column)
        self.folder, self.table, self.unused = folder, table, unused
        self.chosen = np.arange(len(table)) if chosen is None else chosen
        self.times = times

    def __len__(self):
        return len(self.chosen)

    def select(self, indices):
        times = None if self.times is None else self.times[indices]
        chosen = FolderRows(self.folder, self.table, self.caption_column, self.unused, times, self.chosen[indices])
        chosen.background, chosen.alpha_mask = self.background, self.alpha_mask
        return chosen

    def _value(self, column: str, index: int):
        return self.table[column][int(self.chosen[index])].as_py()

    def _values(self, column: str, start: int, stop: int):
        return self.table[column].take(pyarrow.array(self.chosen[start:stop]))

    def name(self, index: int) -> str:
        return f"{self.location(index)} (row {index})"

    def location(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self._value("name", index)))

    def mask_location(self, index: int) -> str:
        mask = self._value("mask", index)
        if mask is None:
            stem = os.path.splitext(os.path.basename(self.location(index)))[0]
            raise BadSampleError(f"{self.name(index)}: it has no mask; expected {stem}.mask.png, or a --mask_column")
        return os.path.join(self.folder, os.fsdecode(mask))

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

    def without_captions(self) -> np.ndarray:
        return np.flatnonzero(self._values("problem", 0, len(self)).is_valid())

    def source_digest(self) -> str:
        return source_digest(self.folder)

    def stamps(self) -> np.ndarray:
        return as_stamps(self._values("stamp", 0, len(self)))

    def all_stamps(self) -> np.ndarray:
        return as_stamps(self.table["stamp"])

    def count_origins(self) -> dict:
        """{where usable captions are from: number of images}."""
        origin = np.delete(self._values("origin", 0, len(self)).to_numpy(), self.without_captions())
        origins, counts = np.unique(origin, return_counts=True)
        return dict(zip(origins.tolist(), counts.tolist()))

    def summary(self, unreadable=None) -> str:
        unreadable = sorted(self.facts.problems if self.facts else ()) if unreadable is None else unreadable
        rows = {"without caption": self.without_captions(), "unreadable": unreadable}
        found = [(len(bad), what, self.location(int(bad[0]))) for what, bad in rows.items() if len(bad)]
        known = {kind: self.unused.found[kind] for kind in UNUSED if kind in self.unused}
        found += [(count, UNUSED[kind][count > 1], texts[0]) for kind, (count, texts) in known.items()]
        unused = "; ".join(f"{count:,} {what}, for example {example}" for count, what, example in found)
        origins = [f"{count:,} of {ORIGINS[origin]}" for origin, count in self.count_origins().items()]
        line = f"{self.folder}: {len(self):,} image{'s' * (len(self) != 1)}; captions: {', '.join(origins)}"
        line += f"; an epoch has {self.times.sum():,} samples" if self.times is not None else ""
        line += f"; not used: {unused}" if unused else ""
        return one_line(line)


def source_digest(folder: str) -> str:
    """The name of a folder's place in the cache of indices."""
    return content_digest(os.path.realpath(folder).encode(errors="surrogateescape")).hex()


def caption_flags(args, masks=(None, None)) -> CaptionFlags:
    """The flags that say what the captions of a folder are; `masks` is the `dataset.mask_source`."""
    separator = (args.caption_separator or "").replace("\\n", "\n").replace("\\t", "\t")
    return CaptionFlags(args.caption_column, args.caption, separator or None, args.dataset_split, masks)


def open_folder(args, listing: Listing, index_dir: Path, masks=(None, None)) -> tuple:
    """(`FolderRows` of `--train_data_dir`, {column of the metadata: None}). What is wrong is in the rows' `unused`."""
    folder, flags = args.train_data_dir, caption_flags(args, masks)
    wait_until_changes_show(listing.newest)
    table, columns = captioned_images(folder, flags, listing, index_dir / source_digest(folder) / "texts.arrow")
    times = times_of(args.repeats, folder, table["name"])
    return FolderRows(folder, table, flags.column, listing.problems, times), columns


def build_folder(args, listing: Listing, index_dir: Path, masks=(None, None)) -> FolderRows:
    """The same rows for training, from the cache in `index_dir` if no file has changed.

    Raises:
        UserError: training cannot use the folder.
    """
    folder, flags = args.train_data_dir, caption_flags(args, masks)
    made_from = content_digest(repr((flags, args.image_column)).encode(errors="backslashreplace")).hex()
    identity = {"version": VERSION, "files": listing.digest, "captions": made_from}
    file = index_dir / source_digest(folder) / f"rows-{made_from[:8]}.arrow"
    if is_written(file, identity):
        table = read_table(file)
    else:
        rows, columns = open_folder(args, listing, index_dir, masks)
        refuse(args, rows, columns, masks[1])
        unused = json.dumps(rows.unused.found)
        table = write_table(file, rows.table.replace_schema_metadata({UNUSED_KEY: unused}), identity)
    unused = Problems(found=json.loads(table.schema.metadata[UNUSED_KEY]))
    return FolderRows(folder, table, flags.column, unused, times_of(args.repeats, folder, table["name"]))


def refuse(args, rows: FolderRows, columns: dict, mask_column=None) -> None:
    """Raise a `UserError` if training cannot use a folder.

    Args:
        columns: of its metadata.
    """
    folder, flag = args.train_data_dir, f"--train_data_dir: {args.train_data_dir!r}"
    if "bad_metadata" in rows.unused:
        raise UserError(f"{flag}: {rows.unused.describe('bad_metadata')}")
    names, needed = ["image", *(name for name in columns if name != "file_name")], {"--image_column": args.image_column}
    if columns and args.caption is None:
        needed["--caption_column"] = args.caption_column
    if mask_column:
        needed["--mask_column"] = mask_column
    has_texts = TEXT in rows.table["origin"].unique().to_pylist()
    for name, column in needed.items():
        if column not in names:
            hint = "; the text files are used where there is no metadata" if has_texts else ""
            raise UserError(f"{name}: {folder!r} has no column {column!r}; it has {', '.join(names)}{hint}")
    if args.image_column != "image":
        raise UserError(f"--image_column: column {args.image_column!r} of {folder!r} does not hold images")
    if not len(rows):
        why = [rows.unused.describe(kind) for kind in ("other_split", "lost_row") if kind in rows.unused]
        raise UserError(f"{flag} has no images to train{''.join(f'; {text}' for text in why[:1])}")
    if len(rows.without_captions()) == len(rows):
        if not columns and not has_texts:
            raise UserError(f"{flag} has no captions; {THREE_WAYS}")
        problem = rows.table["problem"][0].as_py()
        column, _, value = problem.partition(" holds ")
        if column.startswith("column ") and not value.startswith("None"):
            raise UserError(f"--caption_column: {column} of {folder!r} holds {value}")
        raise UserError(f"{flag} has no usable caption, for example {rows.location(0)}: {problem}; {THREE_WAYS}")
