"""Opens a folder of images, tar shards, a list of files or a dataset of the hub, whichever a path or name stands for.

For commands that inspect data. Unlike `dataset.build_dataset`, a folder that training would refuse is opened, and its
problems are listed.
"""

import argparse
import glob
import os
from dataclasses import dataclass, field

from ppdiffusers_train.data.dataset import index_folder
from ppdiffusers_train.data.folder_files import is_image, list_files, walk
from ppdiffusers_train.data.image_folder import open_folder, refuse
from ppdiffusers_train.data.metadata import METADATA_FILES, Problems, read_rows
from ppdiffusers_train.data.rows import as_captions
from ppdiffusers_train.data.shards import local_shards, open_shards
from ppdiffusers_train.data.tables import build_table
from ppdiffusers_train.errors import UserError

FOLDER, SHARDS, LIST, DATASET = "image folder", "tar shards", "list of files", "dataset"
TABLES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".zip", ".py")


@dataclass
class Source:
    """Opened data.

    `rows` has `len`, `name`, `captions` and `location`; `problems` is a list of (kind, text) that were found without
    opening an image, with kinds of `check.KINDS`; `shards` are the paths of tar shards.
    """

    kind: str
    rows: object
    problems: list = field(default_factory=list)
    shards: list = field(default_factory=list)


def open_source(source: str, image_column="image", caption_column="text", **places) -> Source:
    """Open what `source` names.

    Args:
        image_column, caption_column: of a table; `caption_column` is also the field of .json files in shards.
        places: `dataset_config_name`, `cache_dir` and `index_dir`, as of `arguments.add_data_arguments`.
    Raises:
        UserError: it does not exist, or cannot be used.
    """
    places = {"dataset_config_name": None, "cache_dir": None, "index_dir": None, **places}
    args = argparse.Namespace(image_column=image_column, caption_column=caption_column, **places)
    kind = kind_of(source)
    if kind == SHARDS:
        shards = local_shards(expand(source))
        return Source(kind, open_shards(shards, caption_column, index_folder(args)), shards=shards)
    if kind == LIST:
        return Source(kind, *list_file(source, caption_column))
    args.dataset_name, args.train_data_dir = (None, source) if kind == FOLDER else (source, None)
    if kind == FOLDER and not (listing := list_files(source)).has_archives:
        return open_image_folder(args, listing)
    return Source(kind, build_table(args))


def open_image_folder(args, listing) -> Source:
    """The samples of a folder, also of one that training refuses, and all that is wrong with it."""
    rows, problems = open_folder(args.train_data_dir, args.caption_column, Problems(kept=None), listing)
    found = [(kind, text) for kind, (_, texts) in problems.found.items() for text in texts]
    try:
        refuse(args.train_data_dir, args.image_column, rows, problems)
    except UserError as error:
        found.insert(0, ("refused", str(error)))
    return Source(FOLDER, rows, found)


def kind_of(source: str) -> str:
    """Which of FOLDER, SHARDS, LIST and DATASET `source` is.

    Raises:
        UserError: it is a stream, or a path that does not exist.
    """
    if "://" in source or source.startswith("pipe:"):
        raise UserError(f"{source!r} is a stream, which cannot be inspected; expected local shards")
    if os.path.isdir(source):
        return kind_of_folder(source)
    if source.endswith(".jsonl") and os.path.isfile(source):
        return LIST
    if source.endswith(".tar") or any(map(glob.glob, expand(source))):
        return SHARDS
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(
            f"there is nothing at {source!r}; expected a folder of images, tar shards such as photos-{{000..031}}.tar, "
            "or a dataset's name"
        )
    return DATASET


def kind_of_folder(folder: str) -> str:
    """What a folder contains, judged by its file names."""
    has_shards = has_tables = has_images = False
    for file, entry in walk(folder, "", ()):
        if entry.name in METADATA_FILES:
            return FOLDER
        has_shards |= file.endswith(".tar")
        has_tables |= file.endswith(TABLES)
        has_images |= is_image(file)
    for kind, found in ((SHARDS, has_shards), (DATASET, has_tables), (FOLDER, has_images)):
        if found:
            return kind
    raise UserError(f"{folder!r} holds no data; expected images with a metadata.jsonl, tar shards or parquet files")


def expand(pattern: str) -> list:
    """The paths that a pattern such as `photos-{000..031}.tar` stands for."""
    from webdataset.shardlists import expand_urls  # only here: it takes a while to import

    return expand_urls(pattern)


def list_file(file: str, caption_column: str) -> tuple:
    """`ListedRows` of a .jsonl whose rows have a `file_name` relative to it, and [(kind, text)] of the other rows."""
    entries, problems = [], []
    for place, row, problem in read_rows(file):
        if problem:
            problems.append(("bad_metadata", f"{place}: {problem}"))
        else:
            name = row["file_name"]
            entries.append((f"{name} ({place})", os.path.join(os.path.dirname(file), name), row.get(caption_column)))
    return ListedRows(entries, caption_column), problems


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
