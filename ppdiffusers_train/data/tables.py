"""Images with captions in the columns of Arrow tables. What a column's type must be is in `column_types.py`."""

import copy
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pyarrow import compute

from ppdiffusers_train.data.column_types import image_parts
from ppdiffusers_train.data.rows import Rows, content_digest, stamp_of
from ppdiffusers_train.errors import BadSampleError

STAT_THREADS = 8


class TableRows(Rows):
    """Rows of a table.

    Args:
        table: a `pyarrow.Table`, which may be mapped from files.
        chosen: which of its rows, an int64 array; None for all.
    """

    def __init__(self, table, caption_column: str, chosen=None):
        super().__init__(caption_column)
        self.table = table
        self.chosen = np.arange(len(table)) if chosen is None else chosen

    def __len__(self):
        return len(self.chosen)

    def select(self, indices):
        selected = copy.copy(self)
        selected.chosen = self.chosen[indices]
        return selected

    def stored_captions(self, start: int, stop: int) -> list:
        return self._values(self.table[self.caption_column], start, stop)

    def _value(self, column, index: int):
        return column[int(self.chosen[index])].as_py()

    def _values(self, column, start: int, stop: int) -> list:
        """The values of a column in rows `start` to `stop`. (Arrow's `take` would copy the whole column.)"""
        places = self.chosen[start:stop]
        if len(places) and np.array_equal(places, np.arange(places[0], places[0] + len(places))):
            return column.slice(places[0], len(places)).to_pylist()
        return [column[place].as_py() for place in places.tolist()]


class ImageCaptionDataset(TableRows):
    """The images and captions in two columns of a table.

    Args:
        image_column, caption_column: their names. An image is stored as its bytes, as a path, or as a struct of both.
        fingerprint: names the table; another one has another.
        bases: folders that paths may be relative to.
        mask_column: name of a column of masks, which are stored like images, or None.
    """

    def __init__(
        self, table, image_column: str, caption_column: str, fingerprint: str, bases=("",), chosen=None,
        mask_column=None,
    ):  # fmt: skip
        super().__init__(table, caption_column, chosen)
        self.mask_column = mask_column
        self.image_column, self.fingerprint, self.bases = image_column, fingerprint, bases
        self.contents, self.paths = image_parts(table[image_column])  # no image data is copied

    def name(self, index: int) -> str:
        path = self.path(index)
        return f"{path} (row {index})" if path else f"row {index}"

    def path(self, index: int):
        """The path of a row's image as it is stored, or None."""
        return self._value(self.paths, index)

    def is_missing(self, index: int) -> bool:
        """Whether there is no file at the path that a row has for its image."""
        return not self.is_embedded(index) and bool(self.path(index)) and self._stat(index) is None

    def is_embedded(self, index: int) -> bool:
        """Whether the bytes of a row's image are in the table."""
        return bool(self._lengths[self.chosen[index]])

    def location(self, index: int):
        content, path = self._value(self.contents, index), self.path(index)
        if not content and not path:
            raise BadSampleError(f"{self.name(index)}: column {self.image_column!r} holds no image")
        return content or self._find(path, index)

    def mask_location(self, index: int):
        return self._masks.location(int(self.chosen[index]))

    @functools.cached_property
    def _masks(self):
        """All masks of the table, as if they were its images."""
        return ImageCaptionDataset(self.table, self.mask_column, self.caption_column, self.fingerprint, self.bases)

    def stored_names(self, start: int, stop: int) -> list:
        folder = self._common_folder
        return [path and path.removeprefix(folder).lstrip("/") for path in self._values(self.paths, start, stop)]

    def stored_sizes(self, start: int, stop: int) -> list:
        sizes = [size or None for size in self._lengths[self.chosen[start:stop]].tolist()]
        missing = [i for i in range(len(sizes)) if sizes[i] is None]

        def find(part):
            for i in part:
                stat = self._stat(start + i)
                sizes[i] = stat and stat.st_size

        with ThreadPoolExecutor(STAT_THREADS) as threads:  # a network file system answers many requests as fast as one
            list(threads.map(find, (missing[first::STAT_THREADS] for first in range(STAT_THREADS))))
        return sizes

    def source_digest(self) -> str:
        return content_digest(self.fingerprint.encode()).hex()

    def stamps(self) -> np.ndarray:
        """Of embedded images the table's fingerprint and the row, of others their files' stamps."""
        found = []
        for index, (place, length) in enumerate(zip(self.chosen.tolist(), self._lengths[self.chosen].tolist())):
            stat = None if length else self._stat(index)
            embedded = content_digest(f"{self.fingerprint} {place}".encode()) if length else b""
            found.append(stamp_of(stat) if stat else embedded)
        return np.array(found, "S16")

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        """How many bytes of each image of the table are embedded in it: int64 [n]."""
        return compute.fill_null(compute.binary_length(self.contents), 0).to_numpy().astype(np.int64)

    @functools.cached_property
    def _common_folder(self) -> str:
        """The common folder of all paths: where this copy of the data is."""
        extremes = compute.min_max(self.paths).as_py()
        return os.path.commonprefix([path or "" for path in extremes.values()]).rpartition("/")[0]

    def _stat(self, index: int):
        """What the file system knows of the file of a row's image, or None if there is no such file."""
        try:
            return os.stat(self.location(index))
        except (OSError, ValueError, BadSampleError):
            return None

    def _find(self, path: str, index: int) -> str:
        """The file that a path of the table means; where there is none, the place where it is expected.

        Raises:
            BadSampleError: there are two.
        """
        expected = os.path.join(self.bases[0], path)
        if len(self.bases) == 1 and os.path.exists(expected):
            return expected
        places = [os.path.join(base, spelling) for spelling in spellings(path) for base in self.bases]
        found = {os.path.realpath(place): place for place in places if os.path.exists(place)}
        if len(found) > 1:
            raise BadSampleError(f"{self.name(index)}: the path may mean {' or '.join(found.values())}")
        return next(iter(found.values()), expected)


def spellings(path: str) -> list:
    """Ways to read the path of an image, relative to a folder whose archives are unpacked where they are.

    `a.png` in `b/c.zip` is `b/a.png`, for which tables have `zip://a.png::b/c.zip` or `b/c.zip/a.png`.
    """
    found = [path.removeprefix("file://")]
    if path.startswith("zip://"):
        inner, _, archive = path.removeprefix("zip://").partition("::")
        found = [os.path.join(os.path.dirname(archive), inner)]
    elif ".zip/" in path:
        archive, _, inner = path.partition(".zip/")
        found.append(os.path.join(os.path.dirname(archive), inner))
    return [*found, *(name.replace("\\", "/") for name in found if "\\" in name)]
