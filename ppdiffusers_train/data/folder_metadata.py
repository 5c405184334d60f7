"""The rows of a folder's metadata files, and which of its images each is about."""

import os
import posixpath
import unicodedata

import numpy as np
import pyarrow
from pyarrow import compute, large_binary, large_string

from ppdiffusers_train.data.arrow_files import GrowingColumn, GrowingLists, as_array, taken
from ppdiffusers_train.data.folder_files import Listing, is_image
from ppdiffusers_train.data.metadata import read_rows
from ppdiffusers_train.data.rows import as_captions
from ppdiffusers_train.data.tar_samples import LARGEST_TEXT
from ppdiffusers_train.errors import BadSampleError

SCHEMA = pyarrow.schema(
    {
        "name": large_binary(),  # of the image, relative to the folder
        "captions": pyarrow.large_list(large_string()),
        "problem": large_string(),  # why the row's value is not a caption; if both are null, there is no value
        "mask": large_binary(),  # path of the image's mask, relative to the folder, or null
    }
)

KINDS = SCHEMA.names, SCHEMA.types


def match_metadata(folder: str, listing: Listing, caption_column: str, mask_column=None) -> tuple:
    """Read the metadata of a folder. An image's rows are in the nearest metadata file, in its folder or above it.

    Returns:
        (for each image the place of its row in the table, or -1: int64 [n]; the table, with the columns of `SCHEMA`;
        {column of the metadata: None}). What is wrong is added to the problems of `listing`.
    """
    names, columns = listing.names, {}
    metadata = read_metadata(folder, listing, caption_column, mask_column, columns)
    known, start = np.full(len(names), -1), 0
    nearest, lost, tables = nearest_folders(names, list(metadata)), {}, []
    for number, (here, table) in enumerate(metadata.items()):
        images = np.flatnonzero(nearest == number)
        places, table, lost[here] = match(taken(names, images), table)
        known[images] = np.where(places >= 0, places + start, -1)
        tables.append(table)
        start += len(table)
    add_lost_rows(folder, listing, lost)
    return known, pyarrow.concat_tables(tables) if tables else SCHEMA.empty_table(), columns


def read_metadata(folder: str, listing: Listing, caption_column: str, mask_column, columns: dict) -> dict:
    """{folder of a metadata file: table of its rows}. The names of its columns are added to `columns`."""
    found = {}
    for file in listing.metadata:
        here = posixpath.dirname(file)
        rows = found.setdefault(
            here, [GrowingLists() if name == "captions" else GrowingColumn(kind) for name, kind in zip(*KINDS)]
        )
        for place, row, problem in read_rows(os.path.join(folder, file)):
            if problem:
                listing.problems.add("bad_metadata", f"{place}: {problem}")
                continue
            columns.update(dict.fromkeys(row))
            path = os.fsencode(relative_path(folder, here, row["file_name"]))
            mask = row.get(mask_column)
            if not isinstance(mask, str | None):
                problem = f"column {mask_column!r} holds {mask!r}; expected the path of a mask"
                listing.problems.add("bad_metadata", f"{place}: {problem}")
                continue
            mask = mask and os.fsencode(relative_path(folder, here, mask))
            for column, value in zip(rows, (path, *usable_captions(row.get(caption_column), caption_column), mask)):
                column.add(value)
    tables = {here: [column.array() for column in rows] for here, rows in found.items()}
    return {here: pyarrow.Table.from_arrays(arrays, schema=SCHEMA) for here, arrays in tables.items()}


def usable_captions(value, column: str) -> tuple:
    """(list of captions, None), or (None, why the value is not a caption); (None, None) if there is no value."""
    if value is None:
        return None, None
    try:
        captions = as_captions(value, "", column)
        longest = max(len(caption.encode()) for caption in captions)
    except BadSampleError as error:
        return None, str(error).removeprefix(": ")
    except UnicodeEncodeError:
        return None, f"column {column!r} holds half of a surrogate pair; expected valid Unicode"
    if longest > LARGEST_TEXT:
        return None, f"column {column!r} holds a text of {longest:,} bytes; expected at most {LARGEST_TEXT:,}"
    return captions, None


def relative_path(folder: str, here: str, name: str) -> str:
    """The path of a row's image, relative to the folder of the data if it is in there.

    Args:
        here: the folder of the metadata.
        name: of the image in its row, relative to `here` or absolute.
    """
    if posixpath.isabs(name):
        tops = {os.path.abspath(folder), os.path.realpath(folder)}
        return next((name[len(top) + 1 :] for top in tops if name.startswith(top + "/")), name)
    path = posixpath.join(here, name)
    return posixpath.normpath(path) if "./" in path or "//" in path else path


def plain_path(path: bytes) -> str:
    """A path as another system may have written it: with "\\" for "/", and accents as characters of their own."""
    return posixpath.normpath(unicodedata.normalize("NFC", os.fsdecode(path).replace("\\", "/")))


def nearest_folders(names, folders: list) -> np.ndarray:
    """For each image the number of the nearest of `folders` at or above it, or -1: int64 [n]."""
    nearest = np.full(len(names), -1)
    for number in sorted(range(len(folders)), key=lambda number: len(folders[number])):  # the deepest one comes last
        prefix = folders[number] and folders[number] + "/"
        nearest[np.asarray(compute.starts_with(names, os.fsencode(prefix)), bool)] = number
    return nearest


def match(names, table) -> tuple:
    """Match images with the rows of a metadata table.

    Returns:
        (for each image the place of its row or -1, the table in which each image has one row, names of rows about
        no image)
    """
    places, lost = find(names, table["name"])
    if not lost.any():
        return places, table, set()
    if (places < 0).any():
        table = renamed(table, lost, names.filter(pyarrow.array(places < 0)))
        places, lost = find(names, table["name"])
    lost_names = table["name"].filter(pyarrow.array(lost))
    if compute.any(compute.is_in(lost_names, table["name"].filter(pyarrow.array(~lost)))).as_py():
        table = merged(table)  # several rows are about one image
        places, lost = find(names, table["name"])
        lost_names = table["name"].filter(pyarrow.array(lost))
    return places, table, set(lost_names.to_pylist())


def find(names, described) -> tuple:
    """(for each of `names` its place in the column `described` or -1, for each of `described` whether it has none)."""
    described = as_array(described)
    if names.equals(described):  # as programs write metadata; a hash of all names would take their memory thrice
        return np.arange(len(names)), np.zeros(len(names), bool)
    places = compute.index_in(names, described).fill_null(-1).to_numpy(zero_copy_only=False)
    is_lost = np.ones(len(described), bool)
    is_lost[places[places >= 0]] = False
    return places, is_lost


def renamed(table, lost: np.ndarray, names):
    """The table with the names that images have, where rows write them in another way. `names` have no row so far."""
    plain = {plain_path(name): name for name in names.to_pylist()}
    described = table["name"].filter(pyarrow.array(lost)).to_pylist()
    known = [plain.get(plain_path(name), name) for name in described]
    column = compute.replace_with_mask(
        as_array(table["name"]), pyarrow.array(lost), pyarrow.array(known, large_binary())
    )
    return table.set_column(0, SCHEMA.field("name"), column)


def merged(table):
    """A metadata table in which each image has one row, with the captions of all its rows."""
    names = compute.dictionary_encode(as_array(table["name"]))
    group = names.indices.to_numpy()
    order = np.argsort(group, kind="stable")
    captions = as_array(table["captions"]).take(pyarrow.array(order))
    lengths = compute.fill_null(compute.list_value_length(captions), 0).to_numpy()
    starts = np.searchsorted(group[order], np.arange(len(names.dictionary)))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    bounds = offsets[np.append(starts, len(table))]
    has_none = bounds[1:] == bounds[:-1]
    lists = pyarrow.LargeListArray.from_arrays(pyarrow.array(bounds), captions.flatten())
    lists = compute.if_else(pyarrow.array(has_none), pyarrow.scalar(None, lists.type), lists)
    problems = as_array(table["problem"].take(pyarrow.array(order[starts])))
    problems = compute.if_else(pyarrow.array(has_none), problems, pyarrow.scalar(None, problems.type))
    masks = as_array(table["mask"].take(pyarrow.array(order[starts])))
    return pyarrow.Table.from_arrays([names.dictionary, lists, problems, masks], schema=SCHEMA)


def add_lost_rows(folder: str, listing: Listing, lost: dict) -> None:
    """Add the rows of metadata that belong to no image to the problems. `lost` is {folder: their names}."""
    for file in listing.metadata:
        here = posixpath.dirname(file)
        for place, row, problem in read_rows(os.path.join(folder, file)) if lost[here] else ():
            name = "" if problem else relative_path(folder, here, row["file_name"])
            if not problem and os.fsencode(name) in lost[here]:
                listing.problems.add("lost_row", f"{place}: {why_lost(folder, here, name)}")


def why_lost(folder: str, here: str, name: str) -> str:
    """Why a row of metadata in the folder `here` is about no image."""
    path = os.path.join(folder, name)
    if posixpath.isabs(name) or not name.startswith(here and here + "/") or name.startswith("../"):
        return f"{path} is not below the folder of the metadata"
    if not os.path.exists(path):
        return f"there is no file {path}"
    if is_image(name):
        return f"{path} has metadata that is nearer"
    return f"{path} is no image to the loader, by its extension"
