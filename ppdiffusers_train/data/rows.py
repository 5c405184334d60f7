"""Images with captions as rows of one form, wherever they are stored."""

import contextlib
import copy
import functools
import hashlib
import io
import json
import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ppdiffusers_train.errors import BadSampleError

ORIENTATION_TAG = 0x0112  # of EXIF
# How an image with an EXIF orientation is turned upright; from 5 on, height and width are swapped.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Rows:
    """Rows `{"image": RGB PIL image, "caption": a text, or a list of several, "name": str}` of a table.

    A subclass gives a row's name and where its image is stored.

    Args:
        table: a `datasets.Dataset`.
        caption_column: name of the column with the captions.
    """

    def __init__(self, table, caption_column: str):
        self.caption_column = caption_column
        self._use(table)

    def _use(self, table):
        self.table = table
        self.texts = table.select_columns([self.caption_column])  # so that reading a caption reads no image
        # A sample reads its row several times. Rows are kept for as many loading threads as there may be.
        self.row = functools.lru_cache(maxsize=32)(table.__getitem__)

    def __len__(self):
        return len(self.table)

    def select(self, indices):
        """The same rows, only those at `indices`."""
        chosen = copy.copy(self)
        chosen._use(self.table.select(indices))
        return chosen

    def name(self, index: int) -> str:
        """The name of row `index` in messages: the file's name where there is one."""
        raise NotImplementedError

    def location(self, index: int):
        """Where the image of row `index` is: a path, a part of a file as (path, offset, size), or its bytes.

        Raises:
            BadSampleError: there is none.
        """
        raise NotImplementedError

    def stored_names(self, start: int, stop: int) -> list:
        """Names of the images of rows `start` to `stop`, the same in any copy of the data."""
        raise NotImplementedError

    def stored_sizes(self, start: int, stop: int) -> list:
        """Sizes of these images as stored, in bytes; None for an image that does not exist."""
        raise NotImplementedError

    def stored_image(self, index: int):
        """The image of row `index` as it is stored: its bytes, or a path.

        Raises:
            BadSampleError: there is none.
            OSError: it cannot be read.
        """
        location = self.location(index)
        return read_stored(location) if isinstance(location, tuple) else location

    def captions(self, index: int) -> list:
        """The captions of row `index`. Training takes one of them at random.

        Raises:
            BadSampleError: there is none, or it is no text.
        """
        return as_captions(self.texts[index][self.caption_column], self.name(index), self.caption_column)

    def count_captions(self) -> int:
        """Number of captions of all rows."""
        columns = (batch[self.caption_column] for batch in self.texts.iter(1000))
        return sum(len(caption) if isinstance(caption, list) else 1 for column in columns for caption in column)

    def digest(self) -> str:
        """A hash of all captions in their order, which identifies the data."""
        digest = hashlib.blake2b(digest_size=8)
        for batch in self.texts.iter(1000):
            digest.update(json.dumps(batch[self.caption_column]).encode())
        return digest.hexdigest()

    def image_digest(self, index: int) -> bytes:
        """A hash of the stored image of row `index`, as it is on disk.

        Raises:
            BadSampleError: the file cannot be read.
        """
        with reading(self.name(index)):
            return content_digest(read_stored(self.location(index)))

    def image_size(self, index: int) -> tuple:
        """Width and height of row `index` as training sees it, from the file's header.

        Raises:
            BadSampleError: the image cannot be read.
        """
        with reading(self.name(index)), open_image(self.stored_image(index)) as file:
            return upright_size(file)

    def __getitem__(self, index: int) -> dict:
        """Row `index`, decoded.

        Raises:
            BadSampleError: the image cannot be read, or the caption is no text.
        """
        captions, name = self.captions(index), self.name(index)
        with reading(name):
            return decode_row(self.stored_image(index), captions, name)


def as_captions(caption, name: str, column: str) -> list:
    """A row's captions from the value of its caption column, a text or a list of texts.

    Raises:
        BadSampleError: there is none, or it is no text.
    """
    captions = caption if isinstance(caption, list) else [caption]
    if not captions or not all(isinstance(text, str) for text in captions):
        raise BadSampleError(f"{name}: column {column!r} holds {caption!r}; expected a text or several")
    return captions


def read_stored(location) -> bytes:
    """The bytes of an image at a `Rows.location`."""
    if isinstance(location, bytes):
        return location
    if not isinstance(location, tuple):
        return Path(location).read_bytes()
    path, offset, size = location
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def content_digest(content: bytes) -> bytes:
    """A hash of an image's bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def decode_row(stored, captions: list, name: str) -> dict:
    """A row from an image's bytes or path, and its captions."""
    return {"image": decode(stored), "caption": captions if len(captions) > 1 else captions[0], "name": name}


def decode(stored) -> Image.Image:
    """The RGB pixels of an image's bytes or path, upright.

    (`ImageOps.exif_transpose` also rewrites the EXIF data, which fails on photographs with malformed data.)
    """
    with open_image(stored) as file:
        orientation = file.getexif().get(ORIENTATION_TAG)
        image = file.convert("RGB")
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def upright_size(file) -> tuple:
    """Width and height, after `decode`, of the image in Pillow's open `file`."""
    orientation = file.getexif().get(ORIENTATION_TAG)
    return (file.height, file.width) if orientation in TURNS and orientation >= 5 else file.size


def with_one_caption(row: dict) -> dict:
    """A row with the first of its captions."""
    caption = row["caption"]
    return {**row, "caption": caption[0] if isinstance(caption, list) else caption}


def open_image(stored):
    """Open an image's bytes or path with Pillow. Only its header is read."""
    try:
        return Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored)
    except UnidentifiedImageError:  # its message contains a memory address
        raise UnidentifiedImageError("it is no image of a known format") from None


@contextlib.contextmanager
def reading(name: str):
    """A context that turns errors of reading an image into a `BadSampleError` that names the row."""
    try:
        yield
    except BadSampleError:
        raise
    except Exception as error:  # Pillow's readers raise all kinds of errors for broken files
        raise BadSampleError(f"{name}: the image cannot be read: {error}") from error


def refuse_small_image(row: dict, smallest) -> None:
    """Raise a `BadSampleError` for an image with a side shorter than `smallest` pixels, where that is not None."""
    width, height = row["image"].size
    if smallest and min(width, height) < smallest:
        raise BadSampleError(f"{row['name']}: {width} x {height} pixels, --min_image_size is {smallest}")


def warn_of_small_images(dataset, size: int) -> None:
    """Print how many images have a side shorter than `size` pixels, and name one: enlarging does not sharpen them."""
    if not isinstance(dataset, Rows):  # a stream, which cannot be read beforehand
        return
    small = []
    for row in tqdm(range(len(dataset)), desc="reading sizes", unit="image", delay=5):
        with contextlib.suppress(BadSampleError):  # training reports it when it reads the row
            if min(dataset.image_size(row)) < size:
                small.append(row)
    if small:
        print(
            f"{len(small)} of {len(dataset)} images are smaller than {size} pixels and are enlarged, for example "
            f"{dataset.name(small[0])}"
        )
