"""Local tar shards. They are indexed once, and can then be read in any order, like a folder of images.

The index of `photos-000.tar` is `photos-000.tar.index`, an Arrow table with a row for each sample: where its image's
bytes are, its captions, its problem. It is stored beside the shard, or in a cache folder if that is not writable, and
is written anew when the shard has changed.
"""

import glob
import hashlib
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from datasets.table import InMemoryTable
from tqdm import tqdm

from ppdiffusers_train.data.rows import Rows
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


class ShardRows(Rows):
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
        cache_folder: folder for indices that cannot be written beside their shards.
    """
    tables = []
    for number, shard in enumerate(tqdm(shards, desc="indexing shards", unit="shard", delay=5)):
        with pyarrow.memory_map(str(index_of(shard, caption_field, cache_folder))) as file:
            table = pyarrow.ipc.open_stream(file).read_all()  # stays mapped after the file is closed
        tables.append(table.append_column("shard", pyarrow.array(np.full(len(table), number, np.int32))))
    table = InMemoryTable(pyarrow.concat_tables(tables))
    return ShardRows(
        datasets.Dataset(table, fingerprint="shards"), shards
    )  # without a fingerprint, it would hash the table


def index_of(shard: Path, caption_field: str, cache_folder: Path) -> Path:
    """The index of a shard, written if it does not exist or is outdated.

    Raises:
        UserError: the shard cannot be read.
    """
    hidden = cache_folder / hashlib.blake2b(str(shard.absolute()).encode(), digest_size=16).hexdigest()
    files = [shard.with_name(f"{shard.name}.index"), hidden]
    try:
        stat = shard.stat()
        schema = SCHEMA.with_metadata(
            {"size": str(stat.st_size), "time": str(stat.st_mtime_ns), "caption_field": caption_field}
        )
        current = next((file for file in files if is_current(file, schema)), None)
        current = current or next((file for file in files if write_index(shard, file, schema, caption_field)), None)
    except OSError as error:
        raise UserError(f"--train_shards_path_or_url: {str(shard)!r} cannot be read: {error}") from error
    if current is None:
        raise UserError(
            f"--cache_dir: {str(hidden)!r} cannot be written, nor can {str(files[0])!r}; expected one that can"
        )
    return current


def is_current(file: Path, schema) -> bool:
    """Whether an index exists and belongs to the current state of the shard."""
    try:
        with pyarrow.OSFile(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
            return reader.schema.equals(schema, check_metadata=True)
    except (OSError, pyarrow.ArrowInvalid):
        return False


def write_index(shard: Path, file: Path, schema, caption_field: str) -> bool:
    """Write the index of a shard atomically. Returns False where nothing can be written."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        target = pyarrow.OSFile(str(temporary), "wb")
    except OSError:
        return False
    with target, pyarrow.ipc.new_stream(target, schema) as writer, open(shard, "rb") as archive:
        rows = []
        for sample in read_samples(archive, caption_field, sequential=False):
            rows.append(vars(sample))
            if len(rows) == ROWS_AT_ONCE:
                writer.write(pyarrow.RecordBatch.from_pylist(rows, schema))
                rows = []
        writer.write(pyarrow.RecordBatch.from_pylist(rows, schema))
    os.replace(temporary, file)
    return True
