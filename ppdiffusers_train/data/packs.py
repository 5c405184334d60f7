"""Packs: files of some thousand encoded samples, which are written once and read at any place.

    values of all samples | keys | form, checksum and offsets of each sample | description (JSON) | tail

A pack is written from front to back under a hidden name, and gets its own name when it is complete and on disk. So
several processes, runs and machines can fill one folder without a lock: each writes packs of its own, and finds those
of the others when they are complete. Equal values, such as the encodings of one caption, are stored once in a pack.

Values keep the type in which they were computed. NumPy has no bfloat16: Paddle gives and takes its bits as uint16.
"""

import hashlib
import json
import math
import os
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

SUFFIX = ".pack"
MAGIC = b"packs 1\n"
TAIL = struct.Struct("<QQ16s8s")  # where the keys begin, length of the description, hash of all between, MAGIC
OPEN_FILES = 256  # most systems allow a process 1024


def as_keys(keys) -> np.ndarray:
    """Keys of 16 bytes each as an array "S16" [n]."""
    return np.frombuffer(b"".join(keys), "S16")


@dataclass(frozen=True)
class Part:
    """One of the values of a sample: how it is stored."""

    name: str
    dtype: np.dtype
    shape: tuple

    @cached_property
    def size(self) -> int:
        """In bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def record_of(width: int) -> struct.Struct:
    """What the index holds of a sample besides its key: number of its form, checksum, offsets of its values."""
    return struct.Struct(f"<iI{width}q")


class Pack:
    """A complete pack.

    Args:
        of: the name that its folder had when it was written.
    Raises:
        OSError: it cannot be read.
        ValueError: it is incomplete, damaged, or of another folder.
    """

    def __init__(self, file: Path, of: str):
        self.file = str(file)
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - TAIL.size))
            tail = opened.read()
            if len(tail) < TAIL.size or not tail.endswith(MAGIC):
                raise ValueError("it is incomplete, or no pack")
            begin, length, digest, _ = TAIL.unpack(tail)
            opened.seek(min(begin, size))
            index = opened.read(max(0, size - TAIL.size - begin))
        if hashlib.blake2b(index, digest_size=16).digest() != digest:
            raise ValueError("its index is damaged")
        self.bytes, self.description = size, json.loads(index[len(index) - length :])
        if self.description["of"] != of:
            raise ValueError(f"it belongs to {self.description['of']!r}")
        self._lay_out(index)

    def _lay_out(self, index: bytes) -> None:
        self.count = self.description["samples"]
        self.keys = np.frombuffer(index, "S16", self.count)
        self.record = record_of(self.description["width"])
        self.records = index[16 * self.count :][: self.record.size * self.count]
        self.forms = [
            [Part(name, np.dtype(kind), tuple(shape)) for name, kind, shape in form]
            for form in self.description["forms"]
        ]

    def __len__(self):
        return self.count

    def read(self, row: int) -> dict:
        """Sample `row`, as `{name: array}`. Values that lie together take one read.

        Raises:
            OSError: it cannot be read, or is damaged.
        """
        form, expected, *offsets = self.record.unpack_from(self.records, row * self.record.size)
        pieces, check = self._pieces(self.forms[form], offsets), 0
        for piece in pieces:
            check = zlib.crc32(piece, check)
        if check != expected:
            raise OSError("a sample in it is damaged; delete it, and its samples are encoded again")
        return {
            part.name: np.frombuffer(piece, part.dtype).reshape(part.shape)
            for part, piece in zip(self.forms[form], pieces)
        }

    def _pieces(self, parts: list, offsets: list) -> list:
        """The bytes of the values."""
        file, pieces, together, end = open_file(self.file), [None] * len(parts), [], -1
        for place in sorted(range(len(parts)), key=offsets.__getitem__):
            if offsets[place] == end:
                together[-1].append(place)
            else:
                together.append([place])
            end = offsets[place] + parts[place].size
        for places in together:
            first = offsets[places[0]]
            whole = memoryview(self._bytes(file, sum(parts[place].size for place in places), first))
            for place in places:
                pieces[place] = whole[offsets[place] - first :][: parts[place].size]
        return pieces

    def _bytes(self, file, size: int, offset: int) -> bytes:
        found = os.pread(file.fileno(), size, offset)
        if len(found) < size:
            raise OSError("it has become shorter")
        return found


@lru_cache(OPEN_FILES)
def open_file(path: str):
    """A file that is kept open; a reader that still has it keeps it open when others take its place."""
    return open(path, "rb", buffering=0)


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
        try:
            return packs[pack].read(row)
        except OSError as error:
            raise OSError(f"{packs[pack].file}: cannot be read, {error}") from error


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
