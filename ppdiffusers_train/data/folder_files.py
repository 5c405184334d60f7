"""The files of an image folder, found by a walk through it. None is opened."""

import hashlib
import os
import posixpath
from array import array
from dataclasses import dataclass

import pyarrow

from ppdiffusers_train.data.metadata import METADATA_FILES
from ppdiffusers_train.data.pixels import extensions
from ppdiffusers_train.data.rows import stamp_of

AT_ONCE = 10_000  # names that are kept as Python objects


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its extension."""
    return posixpath.splitext(name)[1].lower() in extensions()


@dataclass
class Listing:
    """The files of a folder, in the order of their paths, which are relative to it.

    `names` (large_binary), `sizes` and `stamps` are of the images, `metadata` has the paths of metadata files,
    `others` has the first of the other files of each extension. `digest` changes when any of these files does.
    """

    names: object
    sizes: array
    stamps: bytearray
    metadata: list
    others: dict
    digest: str


def list_files(folder: str) -> Listing:
    """Walk through a folder: links are followed, hidden files and folders left out."""
    known, digest, chunks, names = extensions(), hashlib.blake2b(digest_size=16), [], []
    listing = Listing(None, array("q"), bytearray(), [], {}, "")
    for name, entry in walk(folder, "", ()):
        ending = posixpath.splitext(name)[1].lower()
        if ending in known:
            stat = entry.stat()
            stamp = stamp_of(stat)
            names.append(os.fsencode(name))
            listing.sizes.append(stat.st_size)
            listing.stamps += stamp
            if len(names) == AT_ONCE:
                chunks.append(pyarrow.array(names, pyarrow.large_binary()))
                names = []
        elif entry.name in METADATA_FILES:
            listing.metadata.append(name)
            stamp = stamp_of(entry.stat())
        else:
            listing.others.setdefault(ending, name)
            continue
        digest.update(os.fsencode(name) + stamp)
    chunks.append(pyarrow.array(names, pyarrow.large_binary()))
    listing.names, listing.digest = pyarrow.chunked_array(chunks).combine_chunks(), digest.hexdigest()
    return listing


def walk(folder: str, prefix: str, above: tuple):
    """Yield (relative path, `os.DirEntry`) of the files in a folder and below, sorted by path.

    Args:
        prefix: relative path of this folder, ending in "/" unless it is empty.
        above: (device, inode) of the folders around it: a link to one of them is not followed.
    """
    stat = os.stat(folder)
    above = (*above, (stat.st_dev, stat.st_ino))
    with os.scandir(folder) as entries:
        found = [(entry.name + "/" if entry.is_dir() else entry.name, entry) for entry in entries]
    for name, entry in sorted(found, key=lambda pair: pair[0]):
        if name.startswith("."):
            continue
        if not name.endswith("/"):
            if entry.is_file():  # false for a link that leads nowhere
                yield prefix + name, entry
        elif not name.startswith("__"):
            target = entry.stat()
            if (target.st_dev, target.st_ino) not in above:
                yield from walk(entry.path, prefix + name, above)
