"""Writes packs of encoded samples (`packs.py`), and puts small ones together."""

import contextlib
import functools
import hashlib
import math
import os
import secrets
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow

from ppdiffusers_train.data.arrow_files import unfinished
from ppdiffusers_train.data.packs import SUFFIX, VALUES, index_schema, open_packs
from ppdiffusers_train.errors import RunError, writing
from ppdiffusers_train.runtime.checkpoint import sync

PACK_SAMPLES, PACK_BYTES, PACK_SECONDS = 4096, 2 << 30, 120  # a pack is complete at the first of these
ALIGNMENT = 8  # of values in a batch: Arrow's default
AHEAD = 64  # samples that may wait to be written
SMALL_SAMPLES, MANY_SMALL = 1000, 16  # packs of fewer samples are merged if there are more of them


class PackWriter:
    """Writes samples into new packs of a folder, in a thread, which the caller does not wait for.

        with PackWriter(folder) as writer:
            writer.add(key, {name: array})

    At the end, also after an error, the last pack is completed.

    Raises:
        RunError: nothing can be written; raised by one of the next calls, or at the end. Complete packs are kept.
    """

    def __init__(self, folder: Path):
        self.folder, self.written = folder, []
        self._pack, self._waiting, self._has_failed = None, deque(), False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packs")

    def __enter__(self):
        with self.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def add(self, key: bytes, arrays: dict) -> None:
        """Write a sample.

        Args:
            key: 16 bytes.
        """
        self._waiting.append(self._thread.submit(self._write, key, arrays))
        while len(self._waiting) > AHEAD or self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def __exit__(self, *_):
        try:
            while self._waiting:
                self._waiting.popleft().result()
            self._thread.submit(self._complete).result()
        finally:
            self._thread.shutdown()

    def _write(self, key: bytes, arrays: dict) -> None:
        if self._has_failed:
            return  # one of the caller's next calls raises the error
        with self.writing():
            self._pack = self._pack or UnfinishedPack(self.folder)
            self._pack.add(key, arrays)
        if self._pack.is_full():
            self._complete()

    def _complete(self) -> None:
        if self._pack:
            with self.writing():
                self.written.append(self._pack.complete())
            self._pack = None

    @contextlib.contextmanager
    def writing(self):
        """A context that removes the unfinished pack at an error."""
        with writing("--encoded_cache_dir: encoded samples", self.folder, "those in it stay usable"):
            try:
                yield
            except Exception:
                if self._pack:
                    self._pack.discard()
                self._pack, self._has_failed = None, True
                raise


class UnfinishedPack:
    """A pack that is being written."""

    def __init__(self, folder: Path):
        self.target = folder / f"{secrets.token_hex(8)}{SUFFIX}"
        self.temporary = unfinished(self.target)
        self.file, self.begun = open(self.temporary, "xb"), time.monotonic()
        self.batches, self.size = pyarrow.ipc.new_file(self.file, VALUES), 0
        self.keys, self.chosen, self.checks, self.places = [], [], [], []
        self.forms, self.known = {}, {}  # {form: its number}, {hash of a value: its first byte in the file}

    def add(self, key: bytes, arrays: dict) -> None:
        named = sorted((name, np.asarray(array)) for name, array in arrays.items())
        form = tuple((name, array.dtype.str, array.shape) for name, array in named)
        values = [array.tobytes() for _, array in named]
        names = [hashlib.blake2b(value, digest_size=16).digest() for value in values]
        new = {name: value for name, value in zip(names, values) if name not in self.known}
        if new:
            self.known |= zip(new, self._write([*new.values()]))
        self.keys.append(key)
        self.chosen.append(self.forms.setdefault(form, len(self.forms)))
        self.checks.append(functools.reduce(lambda check, value: zlib.crc32(value, check), values, 0))
        self.places.append([self.known[name] for name in names])

    def _write(self, values: list) -> list:
        """Write values as one batch; returns the place of each in the file."""
        self.batches.write_batch(pyarrow.record_batch([pyarrow.array(values, VALUES.types[0])], schema=VALUES))
        *places, size = accumulate(map(len, values), initial=0)
        self.size += size
        # The values, one after the other and padded, are what a batch ends with.
        begin = self.file.tell() - math.ceil(size / ALIGNMENT) * ALIGNMENT
        return [begin + place for place in places]

    def is_full(self) -> bool:
        seconds = time.monotonic() - self.begun
        return len(self.keys) >= PACK_SAMPLES or self.size >= PACK_BYTES or seconds >= PACK_SECONDS

    def complete(self) -> str:
        """Give the pack its name, once it is on disk; returns that name."""
        schema = index_schema({"of": self.target.parent.name, "forms": list(self.forms)})
        table = pyarrow.table([self.keys, self.chosen, self.checks, self.places], schema=schema)
        target = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(target, schema) as stream:
            stream.write_table(table)
        index = target.getvalue().to_pybytes()
        with self.file:
            self._write([index, hashlib.blake2b(index, digest_size=16).digest()])
            self.batches.close()
        sync(self.temporary)
        os.replace(self.temporary, self.target)
        sync(self.target.parent)
        return self.target.name

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # the disk may be full; closing writes what is buffered
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def rewrite(folder: Path, packs: list, is_wanted) -> None:
    """Write the wanted samples of some packs into new ones, each once, and remove these packs.

    Runs that read them meanwhile find the new ones.

    Args:
        is_wanted: keys "S16" [n] -> bool [n].
    Raises:
        OSError, RunError: a pack cannot be read, or nothing can be written; no pack is removed.
    """
    keys = np.concatenate([pack.keys for pack in packs])
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    with PackWriter(folder) as writer:
        for pack, is_first in zip(packs, np.split(first, np.cumsum([len(pack) for pack in packs])[:-1])):
            for row in np.flatnonzero(is_first & is_wanted(pack.keys)).tolist():
                writer.add(bytes(pack.keys[row]).ljust(16, b"\0"), pack.read(row))
    with writing("--encoded_cache_dir: encoded samples", folder, "those in it stay usable"):
        for pack in packs:
            Path(pack.file).unlink(missing_ok=True)


def merge_small(folder: Path) -> None:
    """Put small packs together where there are many. Nothing is lost if that fails."""
    with contextlib.suppress(OSError, RunError):  # another run is doing the same, or the disk is full
        small = [pack for pack in open_packs(folder)[0] if len(pack) < SMALL_SAMPLES and pack.bytes < PACK_BYTES // 4]
        if len(small) > MANY_SMALL:
            rewrite(folder, small, lambda keys: np.ones(len(keys), bool))
