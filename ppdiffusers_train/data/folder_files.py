"""The files of an image folder, found by a walk through it. None is opened."""

import hashlib
import os
import posixpath
from array import array
from dataclasses import dataclass, field

import numpy as np
import pyarrow

from ppdiffusers_train.data.arrow_files import GrowingColumn, as_array
from ppdiffusers_train.data.metadata import METADATA_FILES
from ppdiffusers_train.data.pixels import extensions
from ppdiffusers_train.data.problems import Problems
from ppdiffusers_train.data.rows import stamp_of
from ppdiffusers_train.errors import UserError

TEXT_ENDINGS = (".txt", ".caption")  # extensions of files with captions, the preferred one first
SCHEMA = pyarrow.schema(
    {
        "name": pyarrow.large_binary(),  # relative to the folder, with "/"; a name need not be valid text
        "size": pyarrow.int64(),
        "stamp": pyarrow.binary(16),
    }
)


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its extension."""
    return ending_of(name) in extensions()


def ending_of(name: str) -> str:
    """A file's extension, in lower case."""
    return posixpath.splitext(name)[1].lower()


class Files:
    """Collects names, sizes and stamps of files in little memory."""

    def __init__(self):
        self.names, self.sizes, self.stamps = GrowingColumn(pyarrow.large_binary()), array("q"), bytearray()

    def add(self, name: str, size: int, stamp: bytes) -> None:
        """Add a file."""
        self.names.add(os.fsencode(name))
        self.sizes.append(size)
        self.stamps += stamp

    def table(self):
        """A table with the columns of `SCHEMA`."""
        stamps = pyarrow.FixedSizeBinaryArray.from_buffers(
            pyarrow.binary(16), len(self.sizes), [None, pyarrow.py_buffer(self.stamps)]
        )
        sizes = pyarrow.array(np.asarray(self.sizes))
        return pyarrow.Table.from_arrays([self.names.array(), sizes, stamps], schema=SCHEMA)


@dataclass
class Listing:
    """The files of a folder, in the order of their paths, which are relative to it.

    `images` and `texts` (files that may hold captions) are tables with the columns of `SCHEMA`, `metadata` has the
    paths of metadata files, `others` the first of the other files of each extension, texts included. `digest` changes
    when images, texts or metadata do, or the names of others; `newest` is when captions changed last, in s.
    """

    problems: Problems
    images: object = None
    texts: object = None
    metadata: list = field(default_factory=list)
    others: dict = field(default_factory=dict)
    newest: float = 0.0
    digest: str = ""

    @property
    def names(self):
        """The names of the images."""
        return as_array(self.images["name"])


def list_files(folder: str, kept=3) -> Listing:
    """Walk through a folder: links are followed, hidden files and folders left out.

    Args:
        kept: how many texts of each kind of problem to keep; None for all.
    Raises:
        UserError: a folder cannot be read.
    """
    known, digest, images, texts = extensions(), hashlib.blake2b(digest_size=16), Files(), Files()
    listing = Listing(Problems(kept))
    for name in walk(folder):
        path, ending = os.path.join(folder, name), ending_of(name)
        is_metadata = posixpath.basename(name) in METADATA_FILES
        if not is_metadata and ending not in known:
            listing.others.setdefault(ending, name)
        if not is_metadata and ending not in known and ending not in TEXT_ENDINGS:
            listing.problems.add("other_file", path)
            digest.update(os.fsencode(name))  # because they are counted
            continue
        try:
            stat = os.stat(path)
        except OSError:  # also if the file has just been removed
            listing.problems.add("dead_link", path)
            digest.update(os.fsencode(name))
            continue
        stamp = stamp_of(stat)
        digest.update(os.fsencode(name) + stamp)
        if ending in known:
            images.add(name, stat.st_size, stamp)
            continue
        listing.newest = max(listing.newest, stat.st_ctime)
        if is_metadata:
            listing.metadata.append(name)
        else:
            texts.add(name, stat.st_size, stamp)
    listing.images, listing.texts, listing.digest = images.table(), texts.table(), digest.hexdigest()
    return listing


def walk(folder: str, prefix: str = "", above: tuple = ()):
    """Yield the paths of the files in a folder and below, sorted, and of links that lead nowhere.

    Args:
        prefix: relative path of this folder, ending in "/" unless it is empty.
        above: (device, inode) of the folders around it: a link to one of them is not followed.
    Raises:
        UserError: a folder cannot be read.
    """
    try:
        stat = os.stat(folder)
        with os.scandir(folder) as entries:
            names = sorted(name for entry in entries if (name := entry_name(entry)))
    except OSError as error:
        raise UserError(f"the folder {folder!r} cannot be read: {error.strerror}") from error
    if (stat.st_dev, stat.st_ino) in above:
        return
    for name in names:
        if name.endswith("/"):
            yield from walk(os.path.join(folder, name[:-1]), prefix + name, (*above, (stat.st_dev, stat.st_ino)))
        else:
            yield prefix + name


def entry_name(entry) -> str:
    """The name of an `os.DirEntry`, with "/" behind a folder's; empty if it is left out."""
    if entry.name.startswith("."):
        return ""
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # links in a circle
        is_folder = is_file = False
    if is_folder:
        return "" if entry.name.startswith("__") else entry.name + "/"
    leads_nowhere = entry.is_symlink() and not os.path.exists(entry.path)
    return entry.name if is_file or leads_nowhere else ""
