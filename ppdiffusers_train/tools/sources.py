"""Opens a folder of images, tar shards, a table or a dataset of the hub, whichever a path or name stands for.

For commands that inspect data. Unlike `dataset.build_dataset`, a folder that training would refuse is opened, and its
problems are listed.
"""

import argparse
import glob
import os
from dataclasses import dataclass, field

from ppdiffusers_train.data.dataset import index_folder, look_at, refuse_folder_flags, refuse_split
from ppdiffusers_train.data.folder_kinds import FOLDER, SHARDS, TABLES
from ppdiffusers_train.data.image_folder import open_folder, refuse
from ppdiffusers_train.data.problems import Problems
from ppdiffusers_train.data.shards import local_shards, open_shards
from ppdiffusers_train.data.table_files import is_table
from ppdiffusers_train.data.table_sources import open_table
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.tools.source_flags import FLAGS

MISTAKES = ("bad_metadata", "lost_row", "other_split")  # kinds of a folder's `Problems` that are kinds of `check.KINDS`


@dataclass
class Source:
    """Opened data.

    `rows` are `Rows`; `problems` is a list of (kind, text) that were found without
    opening an image, with kinds of `check.KINDS`; `shards` are the paths of tar shards.
    """

    kind: str
    rows: object
    problems: list = field(default_factory=list)
    shards: list = field(default_factory=list)


def open_source(source: str, image_column="image", caption_column="text", **flags) -> Source:
    """Open what `source` names.

    Args:
        image_column, caption_column: of a table; `caption_column` is also the field of .json files in shards.
        flags: others of `arguments.add_data_arguments`, those of `FLAGS`.
    Raises:
        UserError: it does not exist, or cannot be used.
    """
    flags = {**dict.fromkeys(FLAGS), "dataset_split": "train", **flags}
    args = argparse.Namespace(
        image_column=image_column, caption_column=caption_column, dataset_name=source, train_data_dir=None, **flags
    )
    index_dir = index_folder(args)
    kind, args, listing = (SHARDS, args, None) if are_shards(source) else look_at(args)
    if kind in (SHARDS, TABLES):
        refuse_folder_flags(args)
    if kind == SHARDS:
        refuse_split(args, "shards have no splits")
        shards = local_shards(expand(source))
        rows = open_shards(shards, caption_column, index_dir)
        return Source(kind, rows, [("other_picture", name) for name in rows.other_pictures()], shards)
    if kind == TABLES:
        rows, problems = open_table(args, index_dir, Problems(kept=None))
        return Source(kind, rows, listed(problems))
    refuse_split(args, "a folder of images has none; expected the folder of one split")
    return open_image_folder(args, listing)


def open_image_folder(args, listing) -> Source:
    """The samples of a folder, also of one that training refuses, and all that is wrong with it."""
    listing.problems.kept = None
    rows, columns = open_folder(args, listing, index_folder(args))
    found = [problem for problem in listed(rows.unused) if problem[0] in MISTAKES]
    try:
        refuse(args, rows, columns)
    except UserError as error:
        found.insert(0, ("refused", str(error)))
    return Source(FOLDER, rows, found)


def listed(problems: Problems) -> list:
    """[(kind, text)] of problems."""
    return [(kind, text) for kind, (_, texts) in problems.found.items() for text in texts]


def are_shards(source: str) -> bool:
    """Whether `source` names tar files, not a folder, table or dataset.

    Raises:
        UserError: it is a stream, or a path that does not exist.
    """
    if "://" in source or source.startswith("pipe:"):
        raise UserError(f"{source!r} is a stream, which cannot be inspected; expected local shards")
    if os.path.isdir(source) or (os.path.isfile(source) and is_table(source)):
        return False
    if source.endswith(".tar") or any(map(glob.glob, expand(source))):
        return True
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(
            f"there is nothing at {source!r}; expected a folder of images, tar shards such as photos-{{000..031}}.tar, "
            "a table, or a dataset's name"
        )
    return False


def expand(pattern: str) -> list:
    """The paths that a pattern such as `photos-{000..031}.tar` stands for."""
    from webdataset.shardlists import expand_urls  # only here: it takes a while to import

    return expand_urls(pattern)
