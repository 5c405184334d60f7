"""Opens the tables that `--dataset_name` or `--train_data_dir` names, of the hub or on this machine."""

import os
from pathlib import Path

import datasets

from ppdiffusers_train.data.archives import is_archive, unpacked
from ppdiffusers_train.data.column_types import Columns
from ppdiffusers_train.data.folder_files import walk
from ppdiffusers_train.data.folder_kinds import TABLE_FORMATS, has_configurations, is_saved
from ppdiffusers_train.data.hub_datasets import download
from ppdiffusers_train.data.problems import Problems
from ppdiffusers_train.data.table_files import is_table, open_files, table_files
from ppdiffusers_train.data.tables import ImageCaptionDataset
from ppdiffusers_train.errors import UserError

FIRST = 100  # rows that are looked at to see where images are
ADDRESSES = ("http://", "https://", "s3://", "gs://", "hf://")
NO_CODE = (
    "is loaded by a script of its own, which is never run here; expected a dataset of files, such as the branch "
    "refs/convert/parquet of the same dataset, downloaded into a folder"
)


def build_table(args, index_dir: Path) -> ImageCaptionDataset:
    """The samples of a table.

    Args:
        index_dir: see `image_index.index_images`; archives are unpacked there.
    Raises:
        UserError: it cannot be loaded, a column does not exist, or a row cannot be read.
    """
    rows, problems = open_table(args, index_dir)
    flag, source = named(args)
    if "bad_metadata" in problems:
        raise UserError(f"{flag}: {problems.describe('bad_metadata')}")
    if not len(rows):
        raise UserError(f"{flag}: {source!r} has no samples")
    return rows


def open_table(args, index_dir: Path, problems=None) -> tuple:
    """(the rows of a table, the `Problems` of rows that cannot be read).

    Raises:
        UserError: it cannot be loaded, or a column does not exist.
    """
    flag, source = named(args)
    problems = Problems() if problems is None else problems
    columns = Columns(source, args.image_column, args.caption_column, getattr(args, "mask_column", None))
    try:
        if os.path.isfile(source) and not is_table(source):
            raise UserError(
                f"{flag}: {source!r} is not a table; expected a folder or a file {', '.join(TABLE_FORMATS)}"
            )
        if not is_local(args):
            rows = rows_of(chosen_split(load(args), args), columns, args.train_data_dir or "")
            if not os.path.exists(source) and not args.train_data_dir and is_any_missing(rows):
                # The paths are of other files of the same repository.
                rows.bases = (download(source, args.cache_dir),)
        elif is_saved(source):
            rows = rows_of(chosen_split(saved(source), args), columns, source)
        else:
            splits = table_files(source) if os.path.isdir(source) else {"train": [source]}
            rows = open_files(chosen_split(splits, args), columns, args.cache_dir, problems)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises any error of its parts, wrapped or not; the root names the cause
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = " ".join(str(root).split()) or type(root).__name__
        if "trust_remote_code" in reason:
            raise UserError(f"{flag}: {source!r} {NO_CODE}") from error
        raise UserError(f"{flag}: {source!r} cannot be loaded: {reason}") from error
    refuse_addresses(rows, source)
    look_into_archives(rows, index_dir)
    return rows, problems


def named(args) -> tuple:
    """The flag that names the data, and its value."""
    return ("--dataset_name", args.dataset_name) if args.dataset_name else ("--train_data_dir", args.train_data_dir)


def is_local(args) -> bool:
    """Whether the table is read here, not by a builder of `datasets`, as the configurations of a README need."""
    _, source = named(args)
    if args.dataset_config_name or (args.dataset_name and args.train_data_dir):
        return False
    return os.path.isfile(source) or (os.path.isdir(source) and not has_configurations(source))


def saved(folder: str) -> dict:
    """The splits of a folder that `save_to_disk` has written."""
    found = datasets.load_from_disk(folder)
    return {"train": found} if isinstance(found, datasets.Dataset) else found


def load(args) -> dict:
    """The splits of a dataset of the hub, of a folder with configurations, or of a builder of `datasets`."""
    if args.dataset_name == "pandas":
        raise UserError("--dataset_name: 'pandas' reads pickles, which can run code; expected Parquet files")
    name, folder = args.dataset_name or args.train_data_dir, args.train_data_dir if args.dataset_name else None
    return datasets.load_dataset(
        name, args.dataset_config_name, data_dir=folder, cache_dir=args.cache_dir, trust_remote_code=False
    )


def rows_of(dataset, columns: Columns, folder: str) -> ImageCaptionDataset:
    """The rows of a table that `datasets` has loaded. Paths are relative to `folder`."""
    table = dataset.data.table
    image, caption = columns.check(table.schema)[:2]
    chosen = dataset._indices and dataset._indices.column(0).to_numpy()
    return ImageCaptionDataset(table, image, caption, dataset._fingerprint, (folder,), chosen, columns.mask)


def chosen_split(splits: dict, args):
    """The split that `--dataset_split` names."""
    if args.dataset_split not in splits:
        flag, source = named(args)
        raise UserError(
            f"{flag}: {source!r} has the splits {', '.join(splits)}; expected one named {args.dataset_split}: "
            "--dataset_split takes another"
        )
    return splits[args.dataset_split]


def is_any_missing(rows: ImageCaptionDataset) -> bool:
    """Whether there is no file for the path of one of the first rows."""
    return any(rows.is_missing(index) for index in range(min(len(rows), FIRST)))


def look_into_archives(rows: ImageCaptionDataset, index_dir: Path) -> None:
    """Where images are missing and there are archives beside the table, unpack these: the images may be there."""
    root = rows.bases[0]
    if root and is_any_missing(rows) and any(map(is_archive, walk(root))):
        folder = unpacked(root, index_dir)
        rows.bases += tuple(os.path.join(folder, os.path.relpath(base, root)) for base in rows.bases)


def refuse_addresses(rows: ImageCaptionDataset, source: str) -> None:
    """Raise a `UserError` if the first image is an address: nothing is downloaded while a run reads its samples."""
    path = rows.path(0) if len(rows) and not rows.is_embedded(0) else None
    if path and path.startswith(ADDRESSES):
        raise UserError(
            f"--image_column: column {rows.image_column!r} of {source!r} holds addresses such as {path!r}; expected "
            "images or paths of files: download them first, for example with img2dataset"
        )
