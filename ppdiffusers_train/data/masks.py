"""Masks: which part of an image the loss is taken of. A mask is white there, black elsewhere, and grey in between."""

import os

import numpy as np
from PIL import Image

from ppdiffusers_train.data.pixels import on_background, read
from ppdiffusers_train.data.rows import Rows, content_digest, reading, stamp_of
from ppdiffusers_train.errors import BadSampleError

VERSION = 1  # raised when its functions change encoded samples


class MaskRows(Rows):
    """The masks of rows, as images of their own that are indexed like all images.

    Args:
        rows: they say where each mask is (`mask_location`). Class images that follow them have none: all of such an
            image counts.
        part: names the rows among those of one source.
    """

    def __init__(self, rows: Rows, part: str):
        super().__init__(rows.caption_column)
        self.rows, self.part = rows, part

    def __len__(self):
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.rows.name(index)}, its mask"

    def location(self, index: int):
        return self.rows.mask_location(index)

    def source_digest(self) -> str:
        return content_digest(f"masks of {self.rows.source_digest()}, {self.part}".encode()).hex()

    def stamps(self) -> np.ndarray:
        return np.array([self._stamp(index) for index in range(len(self))], "S16")

    def _stamp(self, index: int) -> bytes:
        """The stamp of a mask's file; of one in memory a hash of its bytes; nothing if it is not there."""
        try:
            location = self.location(index)
            if isinstance(location, bytes):
                return content_digest(location)
            path, *part = location if isinstance(location, tuple) else (location,)
            return stamp_of(os.stat(path), *part)
        except (OSError, ValueError, BadSampleError):
            return b""

    def mask(self, index: int, size: tuple) -> Image.Image:
        """The mask of an image of `size`, (width, height), in mode L.

        Raises:
            BadSampleError: there is none, it cannot be read, or it has another size.
        """
        if index >= len(self):
            return Image.new("L", size, 255)
        with reading(self.name(index)):
            return decode_mask(self.stored_image(index), self.name(index), size)

    def added_to(self, digest: bytes, index: int) -> bytes:
        """A hash of an image's `digest` and of its mask."""
        return content_digest(digest + self.image_digest(index)) if index < len(self) else digest

    def bad(self, images) -> set:
        """The rows whose masks are known to be unusable. `images` are the facts of their images."""
        sizes = images.sizes[: len(self)]
        is_known = (sizes > 0).all(1) & (self.facts.sizes > 0).all(1)
        differs = np.flatnonzero(is_known & (sizes != self.facts.sizes).any(1))
        return {*differs.tolist(), *self.facts.problems}

    def check(self, index: int, size: tuple) -> None:
        """Raise a `BadSampleError` if a mask is known to be unusable for an image of `size`."""
        if index < len(self):
            refuse_size(self.name(index), self.image_size(index), size)


def kind_of_masks(dataset):
    """What masks a data set has, for the key of encoded samples: "alpha", "file", or None. One's own has none."""
    if getattr(dataset, "alpha_mask", False):
        return "alpha"
    return "file" if getattr(dataset, "masks", None) else None


def decode_mask(stored: bytes, name: str, size: tuple) -> Image.Image:
    """A mask from its bytes, in mode L. What is transparent in it is black.

    Args:
        name: of the mask, for messages.
        size: (width, height) of the image.
    Raises:
        BadSampleError: it has another size.
    """
    mask = on_background(read(stored)[0], "#000000").convert("L")
    refuse_size(name, mask.size, size)
    return mask


def refuse_size(name: str, size: tuple, expected: tuple) -> None:
    """Raise a `BadSampleError` if the size of a mask is not that of its image."""
    if tuple(size) != tuple(expected):
        sizes = " x ".join(map(str, size)), " x ".join(map(str, expected))
        raise BadSampleError(f"{name}: {sizes[0]} pixels; expected {sizes[1]}, the size of the image")
