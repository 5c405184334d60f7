"""What is known of a data set's images: content hash, size, and whether they can be read. Each is looked at once.

A table in a cache folder maps an image's stamp (`rows.stamp_of`) to these facts. A start looks for the stamps of its
rows there, and opens only the images that it does not find: new ones, and those that have changed. All ranks that see
the same files divide the work. What a rank has found is written every half a minute, so that a start that is
interrupted continues where it was.
"""

import contextlib
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import compute

from ppdiffusers_train.cpu.free_memory import return_free_memory
from ppdiffusers_train.data.arrow_files import (
    StampIndex,
    as_stamps,
    is_written,
    read_table,
    remove_leftovers,
    taken,
    whole_stamp,
    write_table,
)  # fmt: skip
from ppdiffusers_train.data.inspection import NOTHING, Inspected, inspect
from ppdiffusers_train.data.pixels import VERSION
from ppdiffusers_train.data.rows import Rows, content_digest
from ppdiffusers_train.errors import BadSampleError
from ppdiffusers_train.reporting.status_line import StatusLine
from ppdiffusers_train.runtime.processes import this_machine

FILE, PARTS = "images.arrow", "part-*.arrow"
PART_SECONDS = 30  # between two parts that a rank writes
AT_ONCE = 64  # images that a rank takes at a time, or an eighth of its share if that is less
MANY = 1000  # small tables that are put into one
THREADS = 4  # a network disk answers several requests as fast as one
TYPES = {str: pyarrow.string(), bool: pyarrow.bool_(), int: pyarrow.int32(), bytes: pyarrow.binary(16)}
SCHEMA = pyarrow.schema([(part.name, TYPES[part.type]) for part in fields(Inspected)])
FOUND = pyarrow.schema([("row", pyarrow.int64()), *SCHEMA])
IDENTITY = {"version": 2, "pixels": VERSION}  # of the facts; other values make an index outdated


@dataclass
class Facts:
    """What is known of the images of some rows.

    Args:
        stamps, digests: "S16" [n], of their files and of their contents.
        sizes: int32 [n, 2], width and height as training sees them; 0 for an image that cannot be read.
        problems: {row: why it cannot be read}.
    """

    stamps: np.ndarray
    digests: np.ndarray
    sizes: np.ndarray
    problems: dict

    def has_changed(self, row: int, stamp: bytes, content: bytes) -> bool:
        """Whether a row's image, which now has this stamp and content, has changed since it was indexed."""
        return whole_stamp(self.stamps[row]) != stamp and self._digest(row) != content_digest(content)

    def digest(self, row: int, name) -> bytes:
        """The hash of a row's image. `name(row)` names it if it cannot be read: then a `BadSampleError` is raised."""
        self._check(row, name)
        return self._digest(row)

    def size(self, row: int, name) -> tuple:
        """Width and height of a row's image; raises a `BadSampleError` if it cannot be read."""
        self._check(row, name)
        return tuple(self.sizes[row].tolist())

    def _digest(self, row: int) -> bytes:
        return whole_stamp(self.digests[row])

    def _check(self, row: int, name) -> None:
        if row in self.problems:
            raise BadSampleError(f"{name(row)}: the image cannot be read: {self.problems[row]}")


class Index:
    """The facts that a folder holds, and `more` of them.

    Args:
        folder: of the index; it need not exist.
        more: a table.
    """

    def __init__(self, folder: Path, *more):
        self.folder, self.parts = folder, sorted(folder.glob(PARTS))
        tables = []
        for file in (folder / FILE, *self.parts):
            with contextlib.suppress(OSError, pyarrow.ArrowInvalid):  # damaged, or just removed by another process
                if is_written(file, IDENTITY):
                    tables.append(read_table(file))
        tables += [table.select(SCHEMA.names) for table in more]
        # A single table stays mapped: nothing of it is copied.
        self.table = tables[0] if len(tables) == 1 else pyarrow.concat_tables([SCHEMA.empty_table(), *tables])
        self.find = StampIndex(as_stamps(self.table["stamp"])).find  # the newest place of each stamp in the table

    def write(self, stamps: np.ndarray) -> bool:
        """Write the facts about these stamps into one file, remove the parts; returns whether that was possible."""
        places = np.unique(self.find(np.unique(stamps)))
        write_table(self.folder / FILE, taken(self.table, places[places >= 0]), IDENTITY)
        for part in self.parts:
            with contextlib.suppress(OSError):
                part.unlink()
        remove_leftovers(self.folder)
        return (self.folder / FILE).exists()


def index_images(rows: Rows, ranks, index_dir: Path, log=print) -> None:
    """Look at those images of `rows` that the index does not know yet, and set `rows.facts`. The same of its masks.

    Args:
        index_dir: the folder of all indices.
        log: called with a line if nothing can be written there.
    """
    return_free_memory()  # that building the rows needed
    folder, stamps = index_dir / rows.source_digest(), rows.stamps()
    index = Index(folder)
    places = index.find(stamps)
    known, missing = np.flatnonzero(places >= 0), np.flatnonzero(places < 0)
    # Ranks with the same files in the same state divide the work. Each node may have its own copy of the data.
    state = content_digest(missing.tobytes() + stamps.tobytes())
    states = ranks.gather_objects((state, this_machine() or ranks.rank), "the others to list their images")
    counters = {other: ranks.counter() for other in sorted({other for other, _ in states})}  # the same on all ranks
    search = Search(rows, missing, stamps, folder)
    at_once = max(1, min(AT_ONCE, len(missing) // (8 * ranks.world_size)))
    search.run(ranks.pieces(len(missing), at_once, counters[state]), ranks.is_main)
    parts = ranks.gather_objects(search.take_found(), "the others to read their images")
    parts = [part for parts, (other, _) in zip(parts, states) if other == state for part in parts]
    found = pyarrow.concat_tables([FOUND.empty_table(), *(pyarrow.ipc.open_stream(part).read_all() for part in parts)])
    if states.index(states[ranks.rank]) == ranks.rank and (len(missing) or index.parts):  # the first of its machine
        if not Index(folder, found).write(rows.all_stamps()):
            log(f"--index_dir: {str(folder)!r} cannot be written, so the next start will read all images again")
    rows.facts = collect(stamps, [(known, taken(index.table, places[known])), (found["row"], found)])
    ranks.wait_for_all("the index of the images to be written")
    return_free_memory()
    if rows.masks and not rows.masks.facts:
        index_images(rows.masks, ranks, index_dir, log)


class Decoded:
    """What a check has decoded: images that were decoded at an earlier one, and have not changed, are known.

    Args:
        rows: the rows that are checked.
        index_dir: the folder of all indices.
    """

    def __init__(self, rows: Rows, index_dir: Path):
        self.rows, self.folder, self.stamps = rows, index_dir / rows.source_digest(), rows.stamps()
        self.index, self.new, self.tables = Index(self.folder), [], []
        self.places = self.index.find(self.stamps)
        is_decoded = np.asarray(self.index.table["is_decoded"], bool)
        self.is_known = self.places >= 0  # per row; the others are to be decoded
        self.is_known[self.is_known] = is_decoded[self.places[self.is_known]]

    def known(self, row: int) -> Inspected:
        """What is known of a row's image."""
        return Inspected(**self.index.table.slice(self.places[row], 1).to_pylist()[0])

    def add(self, row: int, seen: Inspected) -> None:
        """Remember an image that has been decoded now."""
        location = self.rows.location(row) if seen.stamp == NOTHING else None
        self.new.append(vars(with_stamp(seen, location, self.stamps[row])))
        if len(self.new) == MANY:
            self._compact()

    def write(self) -> None:
        """Write what was decoded into the index."""
        self._compact()
        Index(self.folder, *self.tables).write(self.rows.all_stamps())

    def _compact(self) -> None:
        self.tables.append(pyarrow.Table.from_pylist(self.new, SCHEMA))
        self.new = []


class Search:
    """A rank's share of the images that the index does not know.

    Args:
        missing: numbers of these rows.
        stamps: of all rows.
        folder: of the index, for parts.
    """

    def __init__(self, rows: Rows, missing: np.ndarray, stamps: np.ndarray, folder: Path):
        self.rows, self.missing, self.stamps, self.folder = rows, missing, stamps, folder
        self.recent, self.found = [], []  # batches; tables of many of them
        self.written, self.last_written = 0, time.monotonic()  # how many of the tables are in parts

    def run(self, pieces, is_main: bool) -> None:
        """Look at images until none is left. `pieces` are this rank's ranges of `missing`."""
        with (
            ThreadPoolExecutor(THREADS, thread_name_prefix="index") as pool,
            StatusLine(
                "reading images", "images", len(self.missing), visible=is_main and len(self.missing) >= MANY
            ) as line,
        ):
            for piece in pieces:
                self.recent += pool.map(self._look_at, np.array_split(self.missing[piece.start : piece.stop], THREADS))
                line.advance(piece.stop - line.done)  # by all ranks
                is_due = time.monotonic() - self.last_written > PART_SECONDS
                if is_due or len(self.recent) > MANY:
                    self._compact()
                if is_due:
                    self._write_part()
        self._compact()

    def take_found(self) -> list:
        """What was found: bytes of tables with the columns of `FOUND`. They are no longer kept here."""
        self.found.reverse()
        return [as_bytes(self.found.pop()) for _ in range(len(self.found))]

    def _look_at(self, rows: np.ndarray):
        seen = [self._look_at_one(row) for row in rows.tolist()]
        columns = {part.name: [getattr(image, part.name) for image in seen] for part in fields(Inspected)}
        return pyarrow.RecordBatch.from_pydict({"row": rows, **columns}, FOUND)

    def _look_at_one(self, row: int) -> Inspected:
        try:
            location = self.rows.location(row)
        except BadSampleError as error:
            return Inspected(problem=str(error))
        return with_stamp(inspect(location, decode=False), location, self.stamps[row])

    def _compact(self) -> None:
        """Put the recent batches into one table, which takes less memory."""
        self.found.append(pyarrow.Table.from_batches(self.recent, FOUND).combine_chunks())
        self.recent = []

    def _write_part(self) -> None:
        """Write what was found since the last part. Nothing is lost if that fails: it is written at the end."""
        table = pyarrow.concat_tables(self.found[self.written :]).select(SCHEMA.names)
        write_table(self.folder / PARTS.replace("*", secrets.token_hex(8)), table, IDENTITY)
        self.written, self.last_written = len(self.found), time.monotonic()


def as_bytes(table) -> bytes:
    """A table as an Arrow stream."""
    target = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(target, table.schema) as writer:
        writer.write_table(table)
    return target.getvalue().to_pybytes()


def with_stamp(seen: Inspected, location, stamp) -> Inspected:
    """What was seen of an image; one in memory, which has no file's stamp, gets its row's."""
    return replace(seen, stamp=whole_stamp(stamp)) if isinstance(location, bytes) else seen


def collect(stamps: np.ndarray, parts: list) -> Facts:
    """The facts of all rows, from [(numbers of rows, table of their images)]."""
    stamps, digests, problems = stamps.copy(), np.zeros(len(stamps), "S16"), {}
    sizes = np.zeros((len(stamps), 2), np.int32)
    for rows, table in parts:
        rows = np.asarray(rows)
        seen = as_stamps(table["stamp"])
        stamps[rows] = np.where(seen == b"", stamps[rows], seen)
        digests[rows] = as_stamps(table["digest"])
        sizes[rows, 0], sizes[rows, 1] = table["width"], table["height"]
        unusable = np.flatnonzero(compute.not_equal(table["problem"], ""))
        texts = table["problem"].take(pyarrow.array(unusable)).to_pylist()
        problems.update(zip(rows[unusable].tolist(), texts))
    return Facts(stamps, digests, sizes, problems)
