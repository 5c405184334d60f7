"""Local tar shards. They are indexed once, and can then be read in any order, like a folder of images.

The index of a shard is an Arrow table with a row for each sample: where its image's bytes are, its captions, its
problem, and the names of more pictures in it. It is stored in a cache folder, never beside the data, and is written
anew when the shard has changed. Where nothing can be written, it is kept in memory.
"""

import glob
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import compute
from tqdm import tqdm

from ppdiffusers_train.data.arrow_files import IDENTITY, atomic_table, is_written, read_table
from ppdiffusers_train.data.folder_files import walk
from ppdiffusers_train.data.folder_kinds import COMPRESSED
from ppdiffusers_train.data.rows import content_digest, stamp_of
from ppdiffusers_train.data.splits import split_of
from ppdiffusers_train.data.tables import TableRows
from ppdiffusers_train.data.tar_samples import NO_MASK, read_samples
from ppdiffusers_train.errors import BadSampleError, UserError
from ppdiffusers_train.reporting.status_line import counted, print_on_main

SCHEMA = pyarrow.schema(
    {
        "name": pyarrow.string(),
        "offset": pyarrow.int64(),
        "size": pyarrow.int64(),
        "captions": pyarrow.list_(pyarrow.string()),
        "problem": pyarrow.string(),
        "others": pyarrow.list_(pyarrow.string()),
        "mask_offset": pyarrow.int64(),
        "mask_size": pyarrow.int64(),
    }
)
VERSION = 3  # raised when archives are read differently
ROWS_AT_ONCE = 1000


class ShardRows(TableRows):
    """The samples of local tar shards. Each problem of an archive is an unusable row.

    Args:
        table: the shards' concatenated indices; its column "shard" is the shard's number.
        shards: their paths.
    """

    def __init__(self, table, shards: list):
        super().__init__(table, "captions")
        self.shards = shards

    def name(self, index: int) -> str:
        return f"{self.shards[self._field('shard', index)]}: {self._field('name', index)}"

    def location(self, index: int) -> tuple:
        self._check(index)
        return self.shards[self._field("shard", index)], self._field("offset", index), self._field("size", index)

    def mask_location(self, index: int) -> tuple:
        self._check(index)
        if not self._field("mask_size", index):
            raise BadSampleError(f"{self.name(index)}: {NO_MASK}")
        return (
            self.shards[self._field("shard", index)],
            self._field("mask_offset", index),
            self._field("mask_size", index),
        )

    def stored_names(self, start: int, stop: int) -> list:
        shards, names = (self._values(self.table[column], start, stop) for column in ("shard", "name"))
        return [f"{self.shards[shard].name}: {name}" for shard, name in zip(shards, names)]

    def stored_sizes(self, start: int, stop: int) -> list:
        return self._values(self.table["size"], start, stop)

    def captions(self, index: int) -> list:
        self._check(index)
        return self._field("captions", index)

    def source_digest(self) -> str:
        return content_digest("\n".join(map(os.path.realpath, self.shards)).encode()).hex()

    def stamps(self) -> np.ndarray:
        stats, stamps = [shard.stat() for shard in self.shards], bytearray()
        for block in self.blocks():
            columns = (self._values(self.table[column], *block) for column in ("shard", "offset", "size"))
            for shard, *part in zip(*columns):
                stamps += stamp_of(stats[shard], *part)
        return np.frombuffer(stamps, "S16")

    def other_pictures(self) -> list:
        """The names of the pictures that are in a sample besides the one that is used."""
        column = self.table["others"]
        found = compute.filter(self.table, compute.greater(compute.list_value_length(column), 0))
        return [
            f"{self.shards[row['shard']]}: {name}"
            for row in found.select(["shard", "others"]).to_pylist()
            for name in row["others"]
        ]

    def _field(self, column: str, index: int):
        return self._value(self.table[column], index)

    def _check(self, index: int) -> None:
        problem = self._field("problem", index)
        if problem:
            raise BadSampleError(f"{self.name(index)}: {problem}")


def local_shards(paths: list) -> list:
    """The tar files of paths, each a file, a folder or a glob, in order.

    Raises:
        UserError: there are none.
    """
    shards = []
    for path in paths:
        if os.path.isdir(path):
            found = shards_to_train(path)
            expected = "a folder with *.tar in it, of the split train"
        else:
            found = [Path(path)] if os.path.isfile(path) else sorted(map(Path, glob.glob(path)))
            expected = "a file, a folder, a pattern such as photos-{000..031}.tar, an address, or pipe:COMMAND"
        if not found:
            raise UserError(f"--train_shards_path_or_url: there are no shards at {path!r}; expected {expected}")
        for shard in found:
            if shard.name.lower().endswith((*COMPRESSED, ".zip")):
                raise UserError(
                    f"--train_shards_path_or_url: {str(shard)!r} is compressed, so its samples cannot be read in any "
                    "order; expected a plain .tar: uncompress it, or stream it with pipe:, for example "
                    "'pipe:gunzip -c photos.tar.gz'"
                )
        shards += found
    return shards


def shards_to_train(folder: str) -> list:
    """The tar files of a folder, also compressed ones, in order. Those of other splits than `train` are left out, which
    is printed."""
    own, others = [], []
    for name in sorted(name for name in walk(folder) if name.lower().endswith((".tar", *COMPRESSED))):
        (own if split_of(name) == "train" else others).append(name)
    if others:
        count = counted(len(others), "shard")
        print_on_main(f"{folder}: not used: {count} of other splits, for example {others[0]}")
    return [Path(folder, name) for name in own]


def open_shards(shards: list, caption_field: str, cache_folder: Path, uses_masks=False) -> ShardRows:
    """The samples of tar files, which are indexed where they have no index yet.

    Args:
        caption_field: see `read_samples`.
        cache_folder: folder for the indices.
    """
    tables, unwritten = [], ""
    for number, shard in enumerate(tqdm(shards, desc="indexing shards", unit="shard", delay=5)):
        table, problem = index_of(shard, caption_field, cache_folder)
        unwritten = unwritten or problem
        tables.append(table.append_column("shard", pyarrow.array(np.full(len(table), number, np.int32))))
    rows = ShardRows(pyarrow.concat_tables(tables), shards)
    if unwritten:
        print_on_main(f"--index_dir: {unwritten}, so the next start will read all shards again")
    if others := rows.other_pictures():
        print_on_main(f"not used: {len(others)} more pictures of samples, for example {others[0]}")
    masks = int(np.count_nonzero(rows.table["mask_size"]))
    if masks and not uses_masks:
        print_on_main(f"not used: {counted(masks, 'mask')} of samples; --masked_loss uses them")
    return rows


def index_of(shard: Path, caption_field: str, cache_folder: Path) -> tuple:
    """(the index of a shard, mapped or in memory, why it could not be written, if so).

    Raises:
        UserError: the shard cannot be read.
    """
    file = cache_folder / "shards" / f"{content_digest(os.path.realpath(shard).encode()).hex()}.arrow"
    try:
        stamp = stamp_of(shard.stat()).hex()
        identity = {"version": VERSION, "stamp": stamp, "caption_field": caption_field}
    except OSError as error:
        raise unreadable(shard, error) from error
    if is_written(file, identity):
        return read_table(file), ""
    try:
        with atomic_table(file, SCHEMA.with_metadata({IDENTITY: json.dumps(identity)})) as writer:
            for batch in batches(shard, caption_field):
                writer.write(batch)
        return read_table(file), ""
    except OSError as error:
        table = pyarrow.Table.from_batches(batches(shard, caption_field), SCHEMA)
        return table, f"{error.filename or str(file)!r} cannot be written ({error.strerror or error})"


def batches(shard: Path, caption_field: str):
    """Yield the samples of a shard as batches of `SCHEMA`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(shard, "rb") as archive:
            samples = read_samples(archive, caption_field, sequential=False)
            while rows := list(map(vars, itertools.islice(samples, ROWS_AT_ONCE))):
                yield pyarrow.RecordBatch.from_pylist(rows, SCHEMA)
    except OSError as error:
        raise unreadable(shard, error) from error


def unreadable(shard: Path, error: OSError) -> UserError:
    """The error that a shard cannot be read."""
    return UserError(f"--train_shards_path_or_url: {str(shard)!r}: {error.strerror or error}")
