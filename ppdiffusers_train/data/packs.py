"""Packs: Arrow files of some thousand encoded samples, which are written once and read in any order.

A batch of a pack's only column holds the values that a sample adds to it: equal values, such as the encodings of one
caption, are stored once in a pack. The last batch holds the index, an Arrow table as a stream, and its hash. The index
has the place of each value in the file, so a sample is read without a look at Arrow's own structure. A pack is written
under a hidden name, and gets its own name when it is complete and on disk. So several processes, runs and machines can
fill one folder without a lock: each writes packs of its own, and finds those of the others when they are complete.

Values keep the type in which they were computed. NumPy has no bfloat16: Paddle gives and takes its bits as uint16.
"""

import hashlib
import json
import math
import os
import weakref
import zlib
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow.fs import LocalFileSystem

from ppdiffusers_train.data.arrow_files import as_stamps

SUFFIX = ".pack"
VALUES = pyarrow.schema([("value", pyarrow.large_binary())])
DISK = LocalFileSystem()
HIDDEN = "_"  # what the name of an array begins with that training does not take
OPEN_FILES = 256  # most systems allow a process 1024
# What reading a damaged file raises: Arrow takes a size, an offset or a missing value from it as it is.
DAMAGE = (OSError, ValueError, IndexError, TypeError, pyarrow.ArrowException)


def as_keys(keys) -> np.ndarray:
    """Keys of 16 bytes each, as an array "S16" [n]."""
    return np.frombuffer(b"".join(keys), "S16")


def index_schema(description: dict):
    """The schema of a pack's index. It has for each sample its key, the number of its form (names, dtypes and shapes),
    the checksum of its values, and their places: the first byte of each in the file.

    Args:
        description: `{"of": name of the folder, "forms": [[[name, type, shape] of each value] of each form]}`.
    """
    columns = {"key": pyarrow.binary(16), "form": pyarrow.int32(), "check": pyarrow.uint32()}
    return pyarrow.schema(
        [*columns.items(), ("places", pyarrow.list_(pyarrow.int64()))], {"description": json.dumps(description)}
    )


class Pack:
    """A complete pack.

    Args:
        of: the name that its folder had when it was written.
    Raises:
        OSError: it cannot be read.
        ValueError: it is incomplete, damaged, or of another folder.
    """

    def __init__(self, file: Path, of: str):
        self.file, self.bytes = str(file), file.stat().st_size
        table = pyarrow.ipc.open_stream(read_index(self.file)).read_all()
        self.description = json.loads(table.schema.metadata[b"description"])
        if self.description["of"] != of:
            raise ValueError(f"it belongs to {self.description['of']!r}")
        if table.schema.remove_metadata() != index_schema({}).remove_metadata():
            raise ValueError("another version wrote it")
        self.forms = [
            [
                (name, np.dtype(kind), tuple(shape), math.prod(shape) * np.dtype(kind).itemsize)
                for name, kind, shape in form
            ]
            for form in self.description["forms"]
        ]
        self.count, self.keys = len(table), as_stamps(table["key"])
        self.form_of, self.checks = (table[name].to_numpy() for name in ("form", "check"))
        places = table["places"].combine_chunks()
        self.starts, self.places = np.asarray(places.offsets), np.asarray(places.values)

    def __len__(self):
        return self.count

    def read(self, row: int) -> dict:
        """Sample `row`, as `{name: array}`.

        Raises:
            OSError: it cannot be read, or is damaged; the message names the file.
        """
        try:
            return self._read(row)
        except DAMAGE as error:
            raise OSError(
                f"{self.file}: a sample in it cannot be read ({error}); delete the file, and its samples are encoded "
                "again"
            ) from error

    def _read(self, row: int) -> dict:
        form, file = self.forms[self.form_of[row]], open_file(self.file)
        places = self.places[self.starts[row] : self.starts[row + 1]].tolist()
        stretches = together(zip(places, (size for *_, size in form)))
        starts, read = [start for start, _ in stretches], [file.read(start, end) for start, end in stretches]
        check, found = 0, {}
        for place, (name, kind, shape, size) in zip(places, form):
            number = bisect_right(starts, place) - 1
            found[name] = np.ndarray(shape, kind, read[number], begin := place - starts[number])
            check = zlib.crc32(memoryview(read[number])[begin : begin + size], check)
        if check != self.checks[row]:
            raise ValueError("it is damaged")
        return found


def as_part(name: str, kind: str, shape: list) -> tuple:
    """(name, dtype, shape, bytes) of a value."""
    return name, np.dtype(kind), tuple(shape), math.prod(shape) * np.dtype(kind).itemsize


def together(values) -> list:
    """The stretches of a file, [first byte, byte after the last], that hold values: one for those that lie together.

    Args:
        values: (first byte, size) of each.
    """
    found = []
    for start, size in sorted(values):
        if not found or found[-1][1] < start:
            found.append([start, start])
        found[-1][1] = max(found[-1][1], start + size)
    return found


def read_index(file: str) -> bytes:
    """The index of a pack, as an Arrow stream.

    Raises:
        OSError: it cannot be read.
        ValueError: the pack is incomplete or damaged.
    """
    try:
        with DISK.open_input_file(file) as opened:
            batches = pyarrow.ipc.open_file(opened)
            if batches.schema != VALUES:
                raise ValueError("other columns")
            last = batches.get_batch(batches.num_record_batches - 1).column(0)
            last.validate(full=True)  # else a damaged offset could lead anywhere
            index, digest = last.to_pylist()
    except DAMAGE as error:
        if getattr(error, "errno", None):
            raise  # an error of the disk, not of the file's contents
        raise ValueError("it is incomplete, or damaged") from error
    if hashlib.blake2b(index or b"", digest_size=16).digest() != digest:
        raise ValueError("its index is damaged")
    return index


class OpenFile:
    """A file that several threads read at once, and that is closed when nobody has it any more.

    It is read, not mapped: an error of a network disk is then an exception, where a mapped page would end the process.
    """

    def __init__(self, file: str):
        self.descriptor = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self.descriptor, end - start, start)


open_file = lru_cache(OPEN_FILES)(OpenFile)


class Packs:
    """All samples of a folder's packs, by key.

    Args:
        folder: it need not exist.
        log: called with a line about a pack that cannot be used.
    """

    def __init__(self, folder: Path, log=print):
        self.folder, self.log, self.refused = folder, log, set()
        self._index = (np.empty(0, "S16"), np.empty(0, np.int64), [])  # sorted keys, their places, packs
        self.refresh()

    def __len__(self):
        return len(self._index[0])

    def refresh(self, names=()) -> None:
        """Look for new packs. Other threads may read meanwhile.

        Args:
            names: of packs that are there, for a network disk that lists its folders late.
        """
        keys, places, packs = self._index
        listed = {file.name for file in self.folder.glob(f"*{SUFFIX}")} | set(names)
        unknown = listed - self.refused - {os.path.basename(pack.file) for pack in packs}
        new = [pack for name in sorted(unknown) if (pack := self._open(name))]
        if not new:
            return
        more = np.concatenate([pack.keys for pack in new])
        rows = np.concatenate([(number << 32) + np.arange(len(pack)) for number, pack in enumerate(new, len(packs))])
        order = np.argsort(more, kind="stable")
        where = np.searchsorted(keys, more[order])  # before equal ones: `read` finds the newest pack
        for pack in new:
            pack.keys = None  # they are among those of all packs
        self._index = (np.insert(keys, where, more[order]), np.insert(places, where, rows[order]), [*packs, *new])

    def _open(self, name: str):
        try:
            return Pack(self.folder / name, self.folder.name)
        except FileNotFoundError:
            return None  # it has been put together with others
        except (OSError, ValueError, KeyError) as error:
            self.refused.add(name)
            self.log(f"{self.folder / name}: is not used, {error}; its samples are encoded again")
            return None

    def find(self, keys: np.ndarray) -> np.ndarray:
        """For each key, whether there is such a sample: bool [n]."""
        known = self._index[0]
        if not len(known):
            return np.zeros(len(keys), bool)
        return known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys

    def read(self, key: bytes) -> dict:
        """The sample of a key, as `{name: array}`.

        Raises:
            KeyError: there is none.
            OSError: it cannot be read.
        """
        try:
            return self._read(key)
        except OSError:  # its pack has been put together with others, perhaps
            self.refresh()
            return self._read(key)

    def _read(self, key: bytes) -> dict:
        known, places, packs = self._index
        (place,) = np.searchsorted(known, wanted := as_keys([key])).tolist()
        if place == len(known) or known[place] != wanted[0]:
            raise KeyError(key)
        pack, row = divmod(int(places[place]), 1 << 32)
        return packs[pack].read(row)


def open_packs(folder: Path) -> tuple:
    """([the packs of a folder], [files that are no packs of it]).

    Raises:
        OSError: a file cannot be read.
    """
    packs, others = [], []
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            packs.append(Pack(file, folder.name))
        except FileNotFoundError:
            continue  # it has been put together with others
        except (ValueError, KeyError):
            others.append(file)
    return packs, others
