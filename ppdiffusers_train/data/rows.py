"""Images with captions as rows of one form, wherever they are stored."""

import contextlib
import errno
import hashlib
import json
import os
from stat import S_ISREG

import numpy as np
from PIL import Image
from tqdm import tqdm

from ppdiffusers_train.data.pixels import WHITE, on_background, open_image, read, upright_size
from ppdiffusers_train.errors import BadSampleError, one_line

VERSION = 1  # raised when its functions change encoded samples

ROWS_AT_ONCE = 1000


class Rows:
    """Rows `{"image": RGB PIL image, "caption": a text, or a list of several, "name": str}`, in any order, and where
    there are masks `"mask"`: a PIL image of mode L and the same size, white where the image is trained on.

    A subclass says where names, images and captions are stored.

    Args:
        caption_column: name of the column with the captions, for messages.
    """

    facts = None
    """What is known of the images, an `image_index.Facts`; None before `image_index.index_images`."""

    times = None
    """How often an epoch uses each row, int64 [n]; None if each is used once."""

    held_out = None
    """Rows whose loss is reported during training, which are never trained on; None without any."""

    background = WHITE
    """The colour behind transparent pixels, as #rrggbb."""

    masks = None
    """The rows' `masks.MaskRows`; None without masks in files of their own."""

    alpha_mask = False
    """Whether an image's transparency is its mask."""

    def __init__(self, caption_column: str):
        self.caption_column = caption_column

    def __len__(self):
        raise NotImplementedError

    def select(self, indices):
        """The same rows, only those at `indices`."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The name of row `index` in messages: the file's name where there is one."""
        raise NotImplementedError

    def location(self, index: int):
        """Where the image of row `index` is: a path, a part of a file as (path, offset, size), or its bytes.

        Raises:
            BadSampleError: there is none.
        """
        raise NotImplementedError

    def mask_location(self, index: int):
        """The same of the mask of row `index`."""
        raise BadSampleError(f"{self.name(index)}: it has no mask")

    def stored_captions(self, start: int, stop: int) -> list:
        """The captions of rows `start` to `stop` as they are stored. No image is read for it."""
        raise NotImplementedError

    def stored_names(self, start: int, stop: int) -> list:
        """Names of the images of rows `start` to `stop`, the same in any copy of the data."""
        raise NotImplementedError

    def stored_sizes(self, start: int, stop: int) -> list:
        """Sizes of these images as stored, in bytes; None for an image that does not exist."""
        raise NotImplementedError

    def source_digest(self) -> str:
        """A name for the data set: its place in the cache of indices."""
        raise NotImplementedError

    def stamps(self) -> np.ndarray:
        """16 bytes for each row that are others once its image has changed on disk: "S16" [n]."""
        raise NotImplementedError

    def all_stamps(self) -> np.ndarray:
        """The stamps also of those rows that `select` has left out."""
        return self.stamps()

    def stored_image(self, index: int) -> bytes:
        """The bytes of the image of row `index`.

        Raises:
            BadSampleError: there is none, or it is not what it was when the run began.
            OSError: it cannot be read.
        """
        location = self.location(index)
        content, stamp, _ = read_stamped(location)
        if self.facts and stamp and self.facts.has_changed(index, stamp, content):
            raise BadSampleError(f"{self.name(index)}: the image has changed since the run began")
        return content

    def captions(self, index: int) -> list:
        """The captions of row `index`. Training takes one of them at random.

        Raises:
            BadSampleError: there is none, or it is no text.
        """
        return as_captions(self.stored_captions(index, index + 1)[0], self.name(index), self.caption_column)

    def blocks(self):
        """Yield (start, stop) of consecutive blocks of rows."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield start, min(start + ROWS_AT_ONCE, len(self))

    def count_captions(self) -> int:
        """Number of captions of all rows."""
        captions = (caption for block in self.blocks() for caption in self.stored_captions(*block))
        return sum(len(caption) if isinstance(caption, list) else caption is not None for caption in captions)

    def summary(self, unreadable=None) -> str:
        """A line that says what of the data is used and what is not, or nothing. `unreadable` are the rows whose images
        cannot be read, by default those of which the index knows it."""
        return ""

    def without_captions(self):
        """The rows that are known to have no usable caption, in order: a sequence of numbers."""
        return ()

    def digest(self) -> str:
        """A hash of all captions in their order, which identifies the data."""
        digest = hashlib.blake2b(digest_size=8)
        for block in self.blocks():
            digest.update(json.dumps(self.stored_captions(*block)).encode())
        return digest.hexdigest()

    def image_digest(self, index: int) -> bytes:
        """A hash of the stored image of row `index`, as it is on disk, and of its mask.

        Raises:
            BadSampleError: a file cannot be read.
        """
        with reading(self.name(index)):
            facts = self.facts
            digest = facts.digest(index, self.name) if facts else content_digest(self.stored_image(index))
        return self.masks.added_to(digest, index) if self.masks else digest

    def image_size(self, index: int) -> tuple:
        """Width and height of row `index` as training sees it, from the file's header.

        Raises:
            BadSampleError: the image cannot be read.
        """
        if self.facts:
            return self.facts.size(index, self.name)
        with reading(self.name(index)):
            location = self.location(index)
            with open_image(location if isinstance(location, str) else read_stored(location)) as file:
                return upright_size(file)

    def image_sizes(self) -> np.ndarray:
        """`image_size` of all rows, int [n, 2]; zeros for an image that cannot be read."""
        if self.facts:
            return self.facts.sizes
        sizes = np.zeros((len(self), 2), np.int32)
        for row in tqdm(range(len(self)), desc="reading sizes", unit="image", delay=5):
            with contextlib.suppress(BadSampleError):  # training reports it when it reads the row
                sizes[row] = self.image_size(row)
        return sizes

    def images_digest(self) -> str:
        """A hash of the contents of all images in their order, once they have been looked at, and of all masks."""
        digest = hashlib.blake2b(self.facts.digests, digest_size=8)
        if self.masks:
            digest.update(self.masks.facts.digests)
        return digest.hexdigest()

    def __getitem__(self, index: int) -> dict:
        """Row `index`, decoded.

        Raises:
            BadSampleError: the image cannot be read, or the caption is no text.
        """
        captions, name = self.captions(index), self.name(index)
        with reading(name):
            row = decode_row(self.stored_image(index), captions, name, self.background, self.alpha_mask)
        return {**row, "mask": self.masks.mask(index, row["image"].size)} if self.masks else row


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
    return read_stamped(location)[0]


def read_stamped(location) -> tuple:
    """Read the image at a `Rows.location`.

    Returns:
        (its bytes, the `stamp_of` its file, the time of the file's last change in s); stamp and time are empty for an
        image in memory.
    """
    if isinstance(location, bytes):
        return location, b"", 0.0
    path, *part = location if isinstance(location, tuple) else (location,)
    with open_regular(path) as file:
        stat = os.fstat(file.fileno())
        content = os.pread(file.fileno(), *reversed(part)) if part else file.read()
    return content, stamp_of(stat, *part), stat.st_ctime


def open_regular(path):
    """Open a file for reading. A device may have no end, and a pipe may never begin: `OSError`."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)
    if not S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file, but a device or pipe")
    return file


def stamp_of(stat: os.stat_result, *part) -> bytes:
    """16 bytes that are others once a file has changed: a hash of its inode, size, and times.

    Args:
        part: offset and size of the image, if it is only a part of the file.
    """
    words = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, *part)
    return hashlib.blake2b(repr(words).encode(), digest_size=16).digest()


def content_digest(content: bytes) -> bytes:
    """A hash of an image's bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def decode_row(stored, captions: list, name: str, background: str = WHITE, alpha_mask: bool = False) -> dict:
    """A row from an image's bytes or path, and its captions; with `alpha_mask`, its transparency is its mask."""
    image, _ = read(stored)
    row = {"image": on_background(image, background), "name": name}
    if alpha_mask:
        row["mask"] = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", image.size, 255)
    return {**row, "caption": captions if len(captions) > 1 else captions[0]}


def with_one_caption(row: dict) -> dict:
    """A row with the first of its captions."""
    caption = row["caption"]
    return {**row, "caption": caption[0] if isinstance(caption, list) else caption}


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
    shorter = dataset.image_sizes().min(axis=1)
    small = np.flatnonzero((shorter > 0) & (shorter < size))
    if len(small):
        print(
            f"{len(small)} of {len(dataset)} images are smaller than {size} pixels and are enlarged, for example "
            f"{one_line(dataset.name(int(small[0])))}"
        )
