"""Image transforms, with NumPy and Pillow, because they run in loader threads."""

from fractions import Fraction

import numpy as np
from PIL import Image, ImageOps

VERSION = 1  # of what its functions give to encoded samples


def center_crop_square(image: Image.Image) -> Image.Image:
    """The largest centred square of an image, without resizing."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def resize_to_cover(image: Image.Image, height: int, width: int, interpolation: str) -> Image.Image:
    """Scale an image so that it just covers `height` x `width` pixels. The longer side is rounded down."""
    scale = max(Fraction(height, image.height), Fraction(width, image.width))
    # torchvision's name for Pillow's `nearest`, which has always been exact
    filter = Image.Resampling[interpolation.removesuffix("-exact").upper()]
    return image.resize((int(image.width * scale), int(image.height * scale)), filter)


def crop_to(image: Image.Image, height: int, width: int, draws, center: bool) -> tuple:
    """Crop to `height` x `width` pixels, in the centre or at a random place from `draws`: (image, top, left)."""
    rows, columns = image.height - height, image.width - width
    if center:
        top, left = round(rows / 2), round(columns / 2)
    else:
        top, left = int(draws.integers("crop_top", 0, rows + 1)), int(draws.integers("crop_left", 0, columns + 1))
    return image.crop((left, top, left + width, top + height)), top, left


def fit(image: Image.Image, height: int, width: int, draws, interpolation: str, center: bool, flip: bool) -> tuple:
    """Scale an image, mirror it with probability 1/2 if `flip`, and crop it to `height` x `width` pixels.

    Mirroring comes before cropping, so that the crop's coordinates hold for the image as the model sees it.

    Returns:
        (image, top, left) with the crop's upper left corner.
    """
    image = resize_to_cover(image, height, width, interpolation)
    if flip and draws.uniform("flip") < 0.5:
        image = ImageOps.mirror(image)
    return crop_to(image, height, width, draws, center)


def normalize_pixels(image: Image.Image) -> np.ndarray:
    """RGB image -> float32 [3, H, W] in [-1, 1]."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0
