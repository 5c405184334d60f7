"""What a folder of data holds, judged by the names of its files: for training, `check` and `pack` alike."""

import os
from pathlib import Path

from ppdiffusers_train.data.archives import ARCHIVE, unpacked
from ppdiffusers_train.data.folder_captions import match_texts
from ppdiffusers_train.data.folder_files import Listing, list_files
from ppdiffusers_train.errors import UserError

FOLDER, SHARDS, TABLES = "image folder", "tar shards", "dataset"
ARROW_FORMATS = (".parquet", ".arrow", ".feather")
TEXT_FORMATS = (".jsonl", ".ndjson", ".csv", ".tsv", ".json")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
TABLE_FORMATS = ARROW_FORMATS + TEXT_FORMATS  # of several in one folder, the first is used


def look_into(folder: str, index_dir: Path) -> tuple:
    """(kind of a folder, the folder to read, its `Listing`). It is another folder if there are archives to unpack.

    Raises:
        UserError: it holds no data, or an archive cannot be unpacked.
    """
    if is_saved(folder):
        return TABLES, folder, None
    listing = list_files(folder)
    kind = kind_of(listing)
    if ARCHIVE in listing.others and kind in (FOLDER, None) and not has_captions_beside(listing):
        folder = unpacked(folder, index_dir)
        listing = list_files(folder)
        kind = kind_of(listing)
    if kind is None:
        others = ", ".join(listing.others.values())
        raise UserError(
            f"{folder!r} holds no data{', but ' if others else ''}{others}; expected images with captions, tar shards, "
            f"zip archives, or tables ({', '.join(TABLE_FORMATS)})"
        )
    return kind, folder, listing


def kind_of(listing: Listing):
    """One of FOLDER, SHARDS and TABLES, or None.

    Images with captions beside them come first: they may have tables beside them that somebody has made from them, and
    copies of datasets of the hub have images beside tables.
    """
    others, has_images = listing.others, len(listing.names) > 0
    if listing.metadata or (has_images and (".txt" in others or ".caption" in others)):
        return FOLDER
    if any(name.lower().endswith((".tar", *COMPRESSED)) for name in others.values()):
        return SHARDS
    if any(ending in others for ending in ARROW_FORMATS):
        return TABLES
    if has_images:
        return FOLDER
    return TABLES if any(ending in others for ending in TEXT_FORMATS) else None


def has_captions_beside(listing: Listing) -> bool:
    """Whether there are text files beside images: archives among these are copies, or something else."""
    return bool((match_texts(listing.names, listing.texts["name"].combine_chunks()) >= 0).any())


def is_saved(folder: str) -> bool:
    """Whether `save_to_disk` of `datasets` has written a folder: a dataset, or several splits."""
    files = ("dataset_dict.json",), ("dataset_info.json", "state.json")
    return any(all(os.path.isfile(os.path.join(folder, name)) for name in names) for names in files)


def has_configurations(folder: str) -> bool:
    """Whether the README of a folder, a copy of a dataset of the hub, says which files belong to which split."""
    try:
        with open(os.path.join(folder, "README.md"), encoding="utf-8", errors="replace") as file:
            head = file.read(100_000)
    except OSError:
        return False
    return head.startswith("---") and "\nconfigs:" in head.partition("\n---")[0]
