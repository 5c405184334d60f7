"""How often an epoch uses each image of a folder: `--repeats 3`, or `--repeats cats=10 dogs=2` by sub-folder."""

import os
import posixpath

import numpy as np
from pyarrow import compute

from ppdiffusers_train.errors import UserError

LARGEST = 1 << 32  # samples of an epoch, with the largest number for all images


def times_of(words, folder: str, names):
    """How often an epoch uses each image: int64 [n], or None if each is used once.

    Args:
        words: of `--repeats`, each a number or FOLDER=NUMBER; None without the flag.
        names: of the images, relative to `folder`: an Arrow array.
    Raises:
        UserError: a sub-folder is named twice, or has no images.
    """
    given = {}
    for word in words or ():
        name, _, number = word.rpartition("=")
        name = posixpath.normpath(name.replace("\\", "/")) if name else "."
        if name in given:
            raise UserError(f"--repeats {word}: {'this folder' if name != '.' else 'all images'} had a number before")
        given[name] = int(number)
    if not given:
        return None
    if len(names) * max(given.values()) > LARGEST:
        raise UserError(f"--repeats {' '.join(words)}: an epoch may have at most {LARGEST:,} samples")
    times = np.full(len(names), given.pop(".", 1))
    for name in sorted(given, key=len):  # a folder within another one comes later
        inside = np.asarray(compute.starts_with(names, os.fsencode(name) + b"/"), bool)
        if not inside.any():
            raise UserError(f"--repeats {name}={given[name]}: {folder!r} has no images in {name}/{hint(names)}")
        times[inside] = given[name]
    return times


def hint(names) -> str:
    """The folders that have images, for a message."""
    parents = compute.unique(compute.replace_substring_regex(names, r"(^|/)[^/]*$", "")).to_pylist()
    folders = [os.fsdecode(parent) for parent in parents[:5] if parent]
    return f"; it has some in {', '.join(folders)}" + (", …" if len(parents) > 5 else "") if folders else ""
