"""Opens a folder of images, tar shards, a list of files or a dataset of the hub, whichever a path or name stands for.

For commands that inspect data. Unlike `dataset.build_dataset`, a folder that training would refuse is opened, and its
problems are listed.
"""

import argparse
import glob
import os
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from ppdiffusers_train.data.image_folder import METADATA_FILES, build_table
from ppdiffusers_train.data.shards import local_shards, open_shards
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.tools.folder_listing import ListedRows, is_image, list_folder, read_rows, walk

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


def open_source(source: str, image_column: str, caption_column: str, config_name=None, cache_dir=None) -> Source:
    """Open what `source` names.

    Args:
        image_column, caption_column: of a table; `caption_column` is also the field of .json files in shards.
        config_name: the configuration, where a dataset has several.
        cache_dir: see `arguments.add_data_arguments`.
    Raises:
        UserError: it does not exist, or cannot be used.
    """
    kind = kind_of(source)
    if kind == SHARDS:
        shards = local_shards(expand(source))
        rows = open_shards(shards, caption_column, Path(cache_dir or HF_HOME) / "ppdiffusers_train")
        return Source(kind, rows, shards=shards)
    if kind == LIST:
        return Source(kind, *list_file(source, caption_column))
    args = argparse.Namespace(
        dataset_name=None if kind == FOLDER else source, train_data_dir=source if kind == FOLDER else None,
        dataset_config_name=config_name, image_column=image_column, caption_column=caption_column, cache_dir=cache_dir,
    )  # fmt: skip
    if kind == DATASET:
        return Source(kind, build_table(args))
    listed, problems = list_folder(source, caption_column)
    try:
        return Source(kind, build_table(args), problems)
    except UserError as error:
        return Source(kind, listed, [("refused", str(error)), *problems])


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
    for file in walk(folder):
        if os.path.basename(file) in METADATA_FILES:
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
