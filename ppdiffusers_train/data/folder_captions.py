"""The images of a folder that are trained on, and the captions of each: from metadata, else from a text file beside
it, else from `--caption`."""

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import compute

from ppdiffusers_train.data import folder_files, folder_metadata
from ppdiffusers_train.data.arrow_files import as_array, taken
from ppdiffusers_train.data.folder_files import TEXT_ENDINGS, Listing
from ppdiffusers_train.data.folder_metadata import match_metadata
from ppdiffusers_train.data.splits import SPLITS
from ppdiffusers_train.data.text_files import as_caption_rows, read_texts

NOTHING, METADATA, TEXT, FLAG = range(4)  # where an image's caption comes from
SCHEMA = pyarrow.schema(
    [
        *folder_files.SCHEMA,
        folder_metadata.SCHEMA.field("captions"),
        folder_metadata.SCHEMA.field("problem"),  # why there is no caption
        pyarrow.field("origin", pyarrow.int8()),
        folder_metadata.SCHEMA.field("mask"),
    ]
)
MASK, ENDING = r"(?i)\.mask", r"\.[^./]*$"


@dataclass(frozen=True)
class CaptionFlags:
    """The values of the flags `--caption_column`, `--caption` and `--caption_separator`, the split to read, and where
    masks are (`dataset.mask_source`)."""

    column: str = "text"
    caption: object = None
    separator: object = None
    split: str = "train"
    masks: tuple = (None, None)


def captioned_images(folder: str, flags: CaptionFlags, listing: Listing, kept_texts: Path) -> tuple:
    """The images of a folder that are trained on, with their captions.

    Args:
        kept_texts: see `read_texts`.
    Returns:
        (a table with the columns of `SCHEMA`, {column of the metadata: None}). What is not used is added to the
        problems of `listing`.
    """
    names = listing.names
    kind, mask_column = flags.masks
    rows, described, columns = match_metadata(folder, listing, flags.column, mask_column)
    of_split = images_of_split(folder, names, listing.problems, flags.split)
    mask_of, are_masks = masks(names)
    for path in paths(folder, names, are_masks) if kind != "file" else ():
        listing.problems.add("mask", path)
    are_masks |= np.asarray(compute.is_in(names, as_array(described["mask"])), bool)
    used = np.flatnonzero(of_split & ~are_masks)
    images, rows = taken(listing.images, used), rows[used]
    has_value = described["captions"].is_valid().to_numpy() | described["problem"].is_valid().to_numpy()
    described_well = (rows >= 0) & np.append(has_value, False)[rows]
    used_names, text_names = as_array(images["name"]), as_array(listing.texts["name"])
    texts = np.where(described_well, -1, match_texts(used_names, text_names))
    add_unread_texts(folder, listing, names, used_names, texts)

    opened, text_rows = np.unique(texts, return_inverse=True)  # the first one stands for no text, if there is such
    files = taken(listing.texts, opened[opened >= 0])
    text_rows -= len(opened) - len(files)
    found = as_caption_rows(folder, files["name"], read_texts(folder, files, kept_texts), flags.separator)
    origin = np.where(described_well, METADATA, np.where(texts >= 0, TEXT, NOTHING if flags.caption is None else FLAG))
    pool = pyarrow.concat_tables([described, found, other_rows(flags)])
    others = len(described) + len(found)
    places = np.select(
        [origin == METADATA, origin == TEXT, origin == FLAG, rows < 0],
        [rows, len(described) + text_rows, others, others + 1],
        others + 2,
    )
    captions = taken(pool, places)
    own_masks = (
        as_array(described["mask"]).take(pyarrow.array(rows, mask=rows < 0))
        if kind == "column"
        else mask_of.take(pyarrow.array(used))
    )
    table = [*images.columns, captions["captions"], captions["problem"], pyarrow.array(np.int8(origin)), own_masks]
    return pyarrow.Table.from_arrays(table, schema=SCHEMA), columns


def other_rows(flags: CaptionFlags):
    """Rows for images with neither a value in metadata nor a text file, with the columns of `folder_metadata.SCHEMA`:
    that of `--caption`, that without a row of metadata, and that whose row has no value."""
    missing = [
        "it has no caption: no row of metadata is about it, and no text file beside it has its name",
        f"column {flags.column!r} holds None; expected a text or several",
    ]
    rows = [{"captions": [flags.caption]}, *({"problem": text} for text in missing)]
    return pyarrow.Table.from_pylist(rows, folder_metadata.SCHEMA)


def images_of_split(folder: str, names, problems, split: str) -> np.ndarray:
    """Whether each image is of a split, which depends on its folder at the top: bool [n]."""

    def within(split):
        return np.asarray(compute.starts_with(names, f"{split}/"), bool)

    if split != "train":
        return within(split)
    train, *others = map(within, SPLITS)  # folders of these names at the top; only the first one is trained on
    trained = train if train.any() else ~np.any(others, axis=0)
    where = "it is not in train/, but in another folder" if train.any() else "it is in a folder of that name"
    for path in paths(folder, names, ~trained):
        problems.add("other_split", f"{path}: {where}")
    return trained


def masks(names) -> tuple:
    """The masks among images, as `cat.mask.png` beside `cat.jpg`.

    Returns:
        (for each image the name of its mask or null, whether each image is the mask of another one: bool [n]).
    """
    found = np.asarray(compute.match_substring_regex(names, MASK + ENDING), bool)
    named = names.filter(pyarrow.array(found))
    stems = compute.replace_substring_regex(named, MASK + ENDING, "")
    if len(named):
        found[found] = np.asarray(compute.is_in(stems, without_ending(names)), bool)
    return named.take(compute.index_in(without_ending(names), stems)), found


def without_ending(names):
    """Names without their extensions."""
    return compute.replace_substring_regex(names, ENDING, "")


def match_texts(names, texts) -> np.ndarray:
    """For each of the images `names` the place of the text file with its caption, or -1: int64 [n].

    That of `cat.jpg` is `cat.txt` or `cat.caption`, else `cat.jpg.txt` or `cat.jpg.caption`; case of the extension does
    not matter, nor whether an accent is a character of its own.
    """
    if not len(texts):
        return np.full(len(names), -1)
    found = match_spelled(names, texts)
    images, others = np.flatnonzero(found < 0), np.setdiff1d(np.arange(len(texts)), found)
    if len(images) and len(others):
        composed_names = composed(names.take(pyarrow.array(images)))
        places = match_spelled(composed_names, composed(texts.take(pyarrow.array(others))))
        found[images] = np.append(others, -1)[places]
    return found


def match_spelled(names, texts) -> np.ndarray:
    """The same for names that are spelled alike."""
    stems, found = without_ending(texts), np.full(len(names), -1)
    for keys in (without_ending(names), names):
        for ending in TEXT_ENDINGS:
            is_such = compute.match_substring_regex(texts, rf"(?i)\{ending}$")
            places = np.flatnonzero(is_such)
            place = compute.index_in(keys, stems.filter(is_such)).fill_null(-1).to_numpy(zero_copy_only=False)
            found = np.where((found < 0) & (place >= 0), np.append(places, -1)[place], found)
    return found


def composed(names):
    """Names in which letters and their accents are one character."""
    texts = (unicodedata.normalize("NFC", os.fsdecode(name)) for name in names.to_pylist())
    return pyarrow.array(map(os.fsencode, texts), pyarrow.large_binary())


def add_unread_texts(folder: str, listing: Listing, names, used, texts: np.ndarray) -> None:
    """Add the text files that are not read to the problems: beside images that have another caption, or of no image.

    Args:
        names, used: of all images, and of those that are trained.
        texts: the places of the text files that are read.
    """
    files = as_array(listing.texts["name"])
    if not len(files):
        return
    stems = without_ending(files)
    unread = np.ones(len(files), bool)
    unread[texts[texts >= 0]] = False

    def beside(images):
        either = (compute.is_in(stems, keys) for keys in (without_ending(images), images))
        return np.asarray(compute.or_(*either), bool)

    for kind, which in (("unread_text", unread & beside(used)), ("lost_text", unread & ~beside(names))):
        for path in paths(folder, files, which):
            listing.problems.add(kind, path)


def paths(folder: str, names, which: np.ndarray):
    """Yield the paths of those of `names` that `which` says."""
    for name in names.filter(pyarrow.array(which)).to_pylist():
        yield os.path.join(folder, os.fsdecode(name))
