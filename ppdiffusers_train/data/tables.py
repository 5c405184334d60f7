"""Images with captions from the hub or from files of tables, through `datasets`, whatever their columns are."""

import copy
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
from pyarrow import compute

from ppdiffusers_train.data.rows import Rows, content_digest, stamp_of
from ppdiffusers_train.errors import BadSampleError, UserError

STAT_THREADS = 8


class TableRows(Rows):
    """Rows of a `datasets.Dataset`."""

    def __init__(self, table, caption_column: str):
        super().__init__(caption_column)
        self._use(table)

    def _use(self, table):
        self.table = table
        self.texts = table.select_columns([self.caption_column])  # so that reading a caption reads no image
        # A sample reads its row several times. Rows are kept for as many loading threads as there may be.
        self.row = functools.lru_cache(maxsize=32)(table.__getitem__)

    def __len__(self):
        return len(self.table)

    def select(self, indices):
        chosen = copy.copy(self)
        chosen._use(self.table.select(indices))
        return chosen

    def stored_captions(self, start: int, stop: int) -> list:
        return self.texts[start:stop][self.caption_column]


class ImageCaptionDataset(TableRows):
    """The rows of a table of `datasets`.

    Args:
        table: a `datasets.Dataset`.
        image_column, caption_column: names of the columns in the table.
    """

    def __init__(self, table, image_column: str, caption_column: str):
        self.fingerprint = table._fingerprint  # a hash of what the table was made from
        # Not decoded here: messages need the path of a broken file, and errors of decoding are caught elsewhere.
        super().__init__(table.cast_column(image_column, datasets.Image(decode=False)), caption_column)
        self.image_column = image_column

    def _use(self, table):
        super()._use(table)
        self.arrow = table.with_format("arrow")

    def name(self, index: int) -> str:
        path = self._field("path", index, index + 1)[0].as_py()
        return f"{path} (row {index})" if path else f"row {index}"

    def location(self, index: int):
        stored = self._stored(index)
        found = stored.get("bytes") or stored.get("path")
        if not found:
            raise BadSampleError(f"{self.name(index)}: column {self.image_column!r} holds no image")
        return found

    def stored_names(self, start: int, stop: int) -> list:
        folder = self._common_folder
        paths = self._field("path", start, stop).to_pylist()
        return [path and path.removeprefix(folder).lstrip("/") for path in paths]

    def stored_sizes(self, start: int, stop: int) -> list:
        sizes = compute.binary_length(self._field("bytes", start, stop)).to_pylist()
        paths = self._field("path", start, stop).to_pylist()
        parts = [range(first, len(paths), STAT_THREADS) for first in range(STAT_THREADS)]

        def find(part):
            for i in part:
                sizes[i] = sizes[i] or file_size(paths[i])

        with ThreadPoolExecutor(STAT_THREADS) as threads:  # a network file system answers many requests as fast as one
            list(threads.map(find, parts))
        return sizes

    def source_digest(self) -> str:
        return content_digest(self.fingerprint.encode()).hex()

    def stamps(self) -> np.ndarray:
        """Of embedded images the table's fingerprint and the row, of others their files' stamps."""
        numbers = self.table._indices.column(0).to_pylist() if self.table._indices else range(len(self))
        paths, found = self._field("path", 0, len(self)).to_pylist(), []
        is_stored = self._field("bytes", 0, len(self)).is_valid().to_pylist()
        for number, path, has_bytes in zip(numbers, paths, is_stored):
            try:
                found.append(
                    content_digest(f"{self.fingerprint} {number}".encode()) if has_bytes else stamp_of(os.stat(path))
                )
            except (OSError, TypeError):
                found.append(b"")
        return np.array(found, "S16")

    @functools.cached_property
    def _common_folder(self) -> str:
        """The common folder of all paths: where this copy of the data is."""
        extremes = compute.min_max(self._field("path", 0, len(self))).as_py()
        return os.path.commonprefix([path or "" for path in extremes.values()]).rpartition("/")[0]

    def _field(self, name: str, start: int, stop: int):
        """The field `path` or `bytes` of the stored images of rows `start` to `stop`, without copying image data."""
        return compute.struct_field(self.arrow[start:stop][self.image_column], name)

    def _stored(self, index: int) -> dict:
        return self.row(index)[self.image_column] or {}


def file_size(path):
    """Size of a file in bytes, or None where it does not exist."""
    try:
        return os.stat(path).st_size
    except (OSError, TypeError):
        return None


def build_table(args) -> ImageCaptionDataset:
    """The samples that `--dataset_name` or `--train_data_dir` names.

    Raises:
        UserError: it cannot be loaded, or a column does not exist.
    """
    flag = "--dataset_name" if args.dataset_name else "--train_data_dir"
    source = args.dataset_name or args.train_data_dir
    try:
        if args.dataset_name:
            tables = datasets.load_dataset(
                args.dataset_name, args.dataset_config_name, data_dir=args.train_data_dir, cache_dir=args.cache_dir
            )
        else:
            tables = datasets.load_dataset("imagefolder", data_dir=args.train_data_dir, cache_dir=args.cache_dir)
    except Exception as error:  # `datasets` raises any error of its parts, wrapped or not; the root names the cause
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise UserError(f"{flag}: {source!r} cannot be loaded: {root or type(root).__name__}") from error
    if "train" not in tables:
        raise UserError(f"{flag}: {source!r} has the splits {', '.join(tables)}; expected one named train")
    table = tables["train"]
    for column_flag, column in (("--image_column", args.image_column), ("--caption_column", args.caption_column)):
        if column not in table.column_names:
            raise UserError(
                f"{column_flag}: {source!r} has no column {column!r}; it has {', '.join(table.column_names)}"
            )
    if not isinstance(table.features[args.image_column], datasets.Image):
        raise UserError(f"--image_column: column {args.image_column!r} of {source!r} does not hold images")
    text = getattr(table.features[args.caption_column], "feature", table.features[args.caption_column])
    if getattr(text, "dtype", None) not in ("string", "large_string", "null"):
        raise UserError(
            f"--caption_column: column {args.caption_column!r} of {source!r} holds {getattr(text, 'dtype', text)}; "
            "expected texts or lists of texts"
        )
    if len(table) == 0:
        raise UserError(f"{flag}: {source!r} has no samples")
    return ImageCaptionDataset(table, args.image_column, args.caption_column)
