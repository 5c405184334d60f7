"""Arrow tables in files: written atomically, with the identity of what they were made from, and read by mapping."""

import contextlib
import json
import os
import secrets
import time
from array import array
from pathlib import Path

import numpy as np
import pyarrow

from ppdiffusers_train.runtime.processes import is_alive, this_machine

IDENTITY = b"made from"
OLD_SECONDS = 24 * 3600  # age of an unfinished file after which no process is still writing it


def write_table(file: Path, table, identity: dict):
    """Write a table, and return it as it is mapped from the file. Where nothing can be written, return it as it is.

    Args:
        identity: what it was made from, for `is_written`.
    """
    table = table.combine_chunks()  # one batch: reading a row does not search for it
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), IDENTITY: json.dumps(identity)})
    try:
        with atomic_table(file, table.schema) as writer:
            writer.write_table(table)
    except OSError:
        return table
    return read_table(file)


@contextlib.contextmanager
def atomic_table(file: Path, schema):
    """A context that gives a writer of batches. The file appears when all are written."""
    with (
        atomic_file(file) as temporary,
        pyarrow.OSFile(str(temporary), "wb") as target,
        pyarrow.ipc.new_file(target, schema) as writer,
    ):
        yield writer


@contextlib.contextmanager
def atomic_file(file: Path):
    """A context that gives the path of a new file to write, which replaces `file` at the end. After an error, it is
    removed."""
    temporary = unfinished(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def unfinished(file: Path) -> Path:
    """A hidden name for a file that is being written: it says who writes it, for `remove_leftovers`."""
    return file.with_name(f".{file.name}.{secrets.token_hex(8)}.{this_machine():x}.{os.getpid()}")


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files of processes that were killed.

    Whether a writer is alive is known on its own machine only. Files of other machines or containers are kept for a
    day.
    """
    for file in folder.glob(".*.*"):
        with contextlib.suppress(OSError):  # its writer has finished it, or another run has removed it
            machine, process = file.name.rsplit(".", 2)[1:]
            if this_machine() and machine == f"{this_machine():x}" and process.isdigit():
                is_left = not is_alive(int(process))
            else:
                is_left = time.time() - file.stat().st_mtime > OLD_SECONDS
            if is_left:
                file.unlink()


def read_table(file: Path):
    """The table of a file, mapped: its pages are shared by all processes.

    Raises:
        OSError, pyarrow.ArrowInvalid: there is none, or it is damaged.
    """
    with pyarrow.memory_map(str(file)) as source:
        return pyarrow.ipc.open_file(source).read_all()


def is_written(file: Path, identity: dict) -> bool:
    """Whether a file holds a table that was made from `identity`."""
    try:
        with pyarrow.OSFile(str(file)) as source:
            metadata = pyarrow.ipc.open_file(source).schema.metadata or {}
    except (OSError, pyarrow.ArrowInvalid):
        return False
    return metadata.get(IDENTITY) == json.dumps(identity).encode()


def as_stamps(column) -> np.ndarray:
    """An Arrow column of 16 bytes each as an array "S16" [n], without copying it."""
    if not len(column):
        return np.empty(0, "S16")
    values = as_array(column)
    return np.frombuffer(values.buffers()[1], "S16")[values.offset : values.offset + len(values)]


def as_array(column):
    """An Arrow column as one array. It is copied only if it consists of several."""
    if not isinstance(column, pyarrow.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def whole_stamp(value) -> bytes:
    """One of the values of `as_stamps` as 16 bytes: NumPy has cut off zeros at its end."""
    return bytes(value).ljust(16, b"\0")


class StampIndex:
    """Finds stamps among others.

    Args:
        stamps: "S16" [n], as of `as_stamps`.
    """

    def __init__(self, stamps: np.ndarray):
        self.order = np.argsort(stamps, kind="stable")
        self.sorted = stamps[self.order]

    def find(self, stamps: np.ndarray) -> np.ndarray:
        """The last place of each stamp, or -1: int64 [m]. A stamp of zeros stands for none."""
        if not len(self.sorted):
            return np.full(len(stamps), -1)
        places = np.searchsorted(self.sorted, stamps, "right") - 1
        return np.where((self.sorted[places] == stamps) & (stamps != b""), self.order[places], -1)


def taken(table, places: np.ndarray):
    """The rows of a table or an array at these places. Rows that follow one another are not copied."""
    first = int(places[0]) if len(places) else 0
    if np.array_equal(places, np.arange(first, first + len(places))):
        return table.slice(first, len(places))
    return table.take(pyarrow.array(places))


class GrowingColumn:
    """Collects the values of a column, bytes or text. Arrow's own ways need the values twice for a time, or as objects.

    Args:
        kind: `pyarrow.large_binary()` or `pyarrow.large_string()`.
    """

    def __init__(self, kind):
        self.kind, self.values, self.ends, self.valid = kind, bytearray(), array("q", [0]), bytearray()

    def add(self, value) -> None:
        """Add a value: bytes, text that is valid Unicode, or None."""
        if value is not None:
            self.values += value if isinstance(value, bytes) else value.encode()
        self.ends.append(len(self.values))
        self.valid.append(value is not None)

    def __len__(self):
        return len(self.valid)

    def array(self):
        """The values as an Arrow array, without copying them. Nothing can be added later."""
        buffers = [validity(self.valid), pyarrow.py_buffer(self.ends), pyarrow.py_buffer(self.values)]
        return pyarrow.Array.from_buffers(self.kind, len(self), buffers)


class GrowingLists:
    """Likewise the values of a column of lists of texts."""

    def __init__(self):
        self.texts, self.ends, self.valid = GrowingColumn(pyarrow.large_string()), array("q", [0]), bytearray()

    def add(self, texts) -> None:
        """Add a list of texts, or None."""
        for text in texts or ():
            self.texts.add(text)
        self.ends.append(len(self.texts))
        self.valid.append(texts is not None)

    def array(self):
        kind = pyarrow.large_list(self.texts.kind)
        buffers = [validity(self.valid), pyarrow.py_buffer(self.ends)]
        return pyarrow.Array.from_buffers(kind, len(self.valid), buffers, children=[self.texts.array()])


def validity(valid: bytearray):
    """Arrow's bitmap of the values that are not null, from a byte for each; None if all are."""
    flags = np.frombuffer(valid, bool)
    return None if flags.all() else pyarrow.py_buffer(np.packbits(flags, bitorder="little"))
