"""Local tar shards. They are indexed once, and can then be read in any order, like a folder of images.

The index of a shard is an Arrow table with a row for each sample: where its image's bytes are, its captions, its
problem. It is stored in a cache folder, never beside the data, and is written anew when the shard has changed.
"""

import glob
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from datasets.table import InMemoryTable
from tqdm import tqdm

from ppdiffusers_train.data.arrow_files import IDENTITY, atomic_table, is_written, read_table
from ppdiffusers_train.data.rows import content_digest, stamp_of
from ppdiffusers_train.data.tables import TableRows
from ppdiffusers_train.data.tar_samples import read_samples
from ppdiffusers_train.errors import BadSampleError, UserError

SCHEMA = pyarrow.schema(
    {
        "name": pyarrow.string(),
        "offset": pyarrow.int64(),
        "size": pyarrow.int64(),
        "captions": pyarrow.list_(pyarrow.string()),
        "problem": pyarrow.string(),
    }
)
ROWS_AT_ONCE = 1000


class ShardRows(TableRows):
    """The samples of local tar shards. Each problem of an archive is an unusable row.

    Args:
        table: the shards' concatenated indices, as a `datasets.Dataset`; its column "shard" is the shard's number.
        shards: their paths.
    """

    def __init__(self, table, shards: list):
        super().__init__(table, "captions")
        self.shards = shards

    def name(self, index: int) -> str:
        row = self.row(index)
        return f"{self.shards[row['shard']]}: {row['name']}"

    def location(self, index: int) -> tuple:
        row = self._usable(index)
        return self.shards[row["shard"]], row["offset"], row["size"]

    def stored_names(self, start: int, stop: int) -> list:
        rows = self.table[start:stop]
        return [f"{self.shards[shard].name}: {name}" for shard, name in zip(rows["shard"], rows["name"])]

    def stored_sizes(self, start: int, stop: int) -> list:
        return self.table[start:stop]["size"]

    def captions(self, index: int) -> list:
        return self._usable(index)["captions"]

    def source_digest(self) -> str:
        return content_digest("\n".join(map(os.path.realpath, self.shards)).encode()).hex()

    def stamps(self) -> np.ndarray:
        stats, stamps = [shard.stat() for shard in self.shards], bytearray()
        for start, stop in self.blocks():
            rows = self.table[start:stop]
            for shard, *part in zip(rows["shard"], rows["offset"], rows["size"]):
                stamps += stamp_of(stats[shard], *part)
        return np.frombuffer(stamps, "S16")

    def _usable(self, index: int) -> dict:
        row = self.row(index)
        if row["problem"]:
            raise BadSampleError(f"{self.name(index)}: {row['problem']}")
        return row


def local_shards(paths: list) -> list:
    """The tar files of paths, each a file, a folder or a glob, in order.

    Raises:
        UserError: there are none.
    """
    shards = []
    for path in paths:
        if os.path.isdir(path):
            found = sorted(Path(path).rglob("*.tar"))
            expected = "a folder with *.tar in it"
        else:
            found = [Path(path)] if os.path.isfile(path) else sorted(map(Path, glob.glob(path)))
            expected = "a file, a folder, a pattern such as photos-{000..031}.tar, an address, or pipe:COMMAND"
        if not found:
            raise UserError(f"--train_shards_path_or_url: there are no shards at {path!r}; expected {expected}")
        shards += found
    return shards


def open_shards(shards: list, caption_field: str, cache_folder: Path) -> ShardRows:
    """The samples of tar files, which are indexed where they have no index yet.

    Args:
        caption_field: see `read_samples`.
        cache_folder: folder for the indices.
    """
    tables = []
    for number, shard in enumerate(tqdm(shards, desc="indexing shards", unit="shard", delay=5)):
        table = read_table(index_of(shard, caption_field, cache_folder))
        tables.append(table.append_column("shard", pyarrow.array(np.full(len(table), number, np.int32))))
    table = InMemoryTable(pyarrow.concat_tables(tables))
    return ShardRows(
        datasets.Dataset(table, fingerprint="shards"), shards
    )  # without a fingerprint, it would hash the table


def index_of(shard: Path, caption_field: str, cache_folder: Path) -> Path:
    """The index of a shard, written if it does not exist or is outdated.

    Raises:
        UserError: the shard cannot be read, or the index cannot be written.
    """
    file = cache_folder / "shards" / f"{content_digest(os.path.realpath(shard).encode()).hex()}.arrow"
    try:
        identity = {"stamp": stamp_of(shard.stat()).hex(), "caption_field": caption_field}
        if not is_written(file, identity):
            write_index(shard, file, SCHEMA.with_metadata({IDENTITY: json.dumps(identity)}), caption_field)
    except OSError as error:
        place = "--train_shards_path_or_url" if error.filename == str(shard) else "--index_dir"
        raise UserError(f"{place}: {error.filename or str(file)!r}: {error.strerror or error}") from error
    return file


def write_index(shard: Path, file: Path, schema, caption_field: str) -> None:
    """Write the index of a shard atomically."""
    with open(shard, "rb") as archive, atomic_table(file, schema) as writer:
        rows = []
        for sample in read_samples(archive, caption_field, sequential=False):
            rows.append(vars(sample))
            if len(rows) == ROWS_AT_ONCE:
                writer.write(pyarrow.RecordBatch.from_pylist(rows, schema))
                rows = []
        writer.write(pyarrow.RecordBatch.from_pylist(rows, schema))
