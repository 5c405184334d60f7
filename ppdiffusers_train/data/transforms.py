"""Images to arrays, in NumPy and Pillow, because they run in loader workers."""

import numpy as np
from PIL import Image


def center_crop_square(image: Image.Image) -> Image.Image:
    """The largest centred square of an image, without resizing."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def resize_short_side(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    """Scale an image so that its shorter side has `size` pixels; the longer side is rounded down."""
    width, height = image.size
    short = min(width, height)
    # torchvision's name for Pillow's `nearest`, which has always been exact
    filter = Image.Resampling[interpolation.removesuffix("-exact").upper()]
    return image.resize((size * width // short, size * height // short), filter)


def crop_square(image: Image.Image, size: int, draws, center: bool) -> tuple:
    """A square of `size` pixels, in the centre or where `draws` says: (image, top, left)."""
    width, height = image.size
    if center:
        top, left = round((height - size) / 2), round((width - size) / 2)
    else:
        top = int(draws.integers("crop_top", 0, height - size + 1))
        left = int(draws.integers("crop_left", 0, width - size + 1))
    return image.crop((left, top, left + size, top + size)), top, left


def normalize_pixels(image: Image.Image) -> np.ndarray:
    """RGB image -> float32 [3, H, W] in [-1, 1]."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0
