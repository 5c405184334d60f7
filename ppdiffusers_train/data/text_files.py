"""Captions in text files beside images. Their contents are kept in a table, so that each file is opened once."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow

from ppdiffusers_train.data.arrow_files import (
    StampIndex,
    as_array,
    as_stamps,
    is_written,
    read_table,
    taken,
    write_table,
)
from ppdiffusers_train.data.folder_metadata import SCHEMA
from ppdiffusers_train.data.inspection import TICK_SECONDS
from ppdiffusers_train.data.plain_text import decoded
from ppdiffusers_train.data.rows import open_regular
from ppdiffusers_train.data.tar_samples import LARGEST_TEXT

KEPT = pyarrow.schema({"stamp": pyarrow.binary(16), "text": pyarrow.large_string(), "problem": pyarrow.large_string()})
IDENTITY = {"version": 1}  # of the table's contents
THREADS = 4  # a network disk answers several requests as fast as one
AT_ONCE = 4096  # texts that are held as Python objects at a time


def read_texts(folder: str, files, kept: Path):
    """The contents of text files, stripped, or why they cannot be read: a table with a row for each file.

    Args:
        files: their `folder_files` table.
        kept: the file that keeps these contents for the next start.
    """
    if not len(files):
        return KEPT.empty_table()
    known = read_table(kept) if is_written(kept, IDENTITY) else KEPT.empty_table()
    places = StampIndex(as_stamps(known["stamp"])).find(as_stamps(files["stamp"]))
    missing = np.flatnonzero(places < 0)
    if not len(missing) and len(known) == len(files):
        return taken(known, places)
    new = read_files(folder, taken(files, missing))
    places[missing] = len(known) + np.arange(len(new))
    table = taken(pyarrow.concat_tables([known, new]), places)
    return write_table(kept, table, IDENTITY)


def read_files(folder: str, files):
    """The same for files whose contents are not known yet."""
    parts = []
    with ThreadPoolExecutor(THREADS, thread_name_prefix="texts") as pool:
        for start in range(0, len(files), AT_ONCE):
            part = files.slice(start, AT_ONCE)
            paths = [os.path.join(folder, os.fsdecode(name)) for name in part["name"].to_pylist()]
            texts, problems = zip(*pool.map(read_text, paths))
            columns = {"stamp": part["stamp"], "text": texts, "problem": problems}
            parts.append(pyarrow.Table.from_pydict(columns, KEPT))
    return pyarrow.concat_tables([KEPT.empty_table(), *parts])


def read_text(path: str) -> tuple:
    """(the contents of a text file, None), or (None, why it cannot be used)."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_TEXT:
                return None, f"it has {size:,} bytes; expected a caption of at most {LARGEST_TEXT:,}"
            return decoded(file.read()).strip(), None
    except (OSError, ValueError) as error:
        return None, getattr(error, "strerror", None) or str(error)


def as_caption_rows(folder: str, names, texts, separator):
    """The captions of text files: a table with the columns of `folder_metadata.SCHEMA`.

    Args:
        names: of the files.
        texts: what `read_texts` returned.
        separator: stands between several captions of a file; None for one caption each.
    """
    parts = []
    for start in range(0, len(texts), AT_ONCE):
        part = texts.slice(start, AT_ONCE).to_pydict()
        captions = [split(text, separator) for text in part["text"]]
        paths = [os.path.join(folder, os.fsdecode(name)) for name in names.slice(start, AT_ONCE).to_pylist()]
        problems = [problem and f"{path}: {problem}" for path, problem in zip(paths, part["problem"])]
        columns = {
            "name": as_array(names.slice(start, AT_ONCE)),
            "captions": captions,
            "problem": problems,
            "mask": [None] * len(captions),
        }
        parts.append(pyarrow.Table.from_pydict(columns, SCHEMA))
    return pyarrow.concat_tables([SCHEMA.empty_table(), *parts])


def split(text, separator):
    """The captions in a text, stripped. Empty ones count only if there is no other."""
    if text is None or separator is None:
        return text if text is None else [text]
    return [part for part in map(str.strip, text.split(separator)) if part] or [""]


def wait_until_changes_show(newest: float) -> None:
    """Wait until the clock of the file system has moved on from `newest`, the last change of the files: a later change
    then gives a file another stamp, so contents that are read from now on belong to the stamps that are known."""
    time.sleep(min(max(newest + TICK_SECONDS - time.time(), 0), TICK_SECONDS))
