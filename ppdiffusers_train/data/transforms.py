"""Image transforms, with NumPy and Pillow, because they run in loader threads."""

from fractions import Fraction

import numpy as np
from PIL import Image, ImageOps

from ppdiffusers_train.data.pixels import EXTREME

VERSION = 1  # raised when its functions change encoded samples


def center_crop_square(image: Image.Image) -> Image.Image:
    """The largest centred square of an image, without resizing."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def square_mask(row: dict, side: int) -> dict:
    """`{"mask": uint8 [1, side, side]}` of a row's mask, for the square of `center_crop_square`; {} without a mask."""
    if "mask" not in row:
        return {}
    return {"mask": np.asarray(center_crop_square(row["mask"]).resize((side, side), Image.Resampling.BOX))[None]}


def without_ends(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than `EXTREME` times as long as wide; any other image as it is.

    For CLIP's image processor, which enlarges the whole image before it crops the centre.
    """
    width, height = image.size
    longest = EXTREME * min(width, height)
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, width - left, height - top)) if left or top else image


def covering_size(image: Image.Image, height: int, width: int) -> tuple:
    """(height, width) of an image once it is scaled to just cover `height` x `width` pixels. The longer side is rounded
    down."""
    scale = max(Fraction(height, image.height), Fraction(width, image.width))
    return int(image.height * scale), int(image.width * scale)


def choose_crop(rows: int, columns: int, draws, center: bool) -> tuple:
    """(top, left) of a crop that may lie so many rows and columns from the corner: in the centre or, from `draws`, at a
    random place."""
    if center:
        return round(rows / 2), round(columns / 2)
    return int(draws.integers("crop_top", 0, rows + 1)), int(draws.integers("crop_left", 0, columns + 1))


def fit(image: Image.Image, height: int, width: int, draws, interpolation: str, center: bool, flip: bool) -> tuple:
    """Scale an image, mirror it with probability 1/2 if `flip`, and crop it to `height` x `width` pixels.

    Mirroring comes before cropping, so that the crop's coordinates hold for the image as the model sees it. An image
    that would be more than `EXTREME` times as large as the crop is not scaled as a whole, but only where it is cropped:
    memory and time are bounded, and values may differ by rounding.

    Returns:
        (image, top, left) with the crop's upper left corner.
    """
    # torchvision's name for Pillow's `nearest`, which has always been exact
    filter = Image.Resampling[interpolation.removesuffix("-exact").upper()]
    rows, columns = covering_size(image, height, width)
    is_mirrored = flip and draws.uniform("flip") < 0.5
    top, left = choose_crop(rows - height, columns - width, draws, center)
    if rows * columns > EXTREME * height * width:
        start = columns - width - left if is_mirrored else left
        part = scaled_part(image, (rows, columns), (top, start, height, width), filter)
        return ImageOps.mirror(part) if is_mirrored else part, top, left
    image = image.resize((columns, rows), filter)
    image = ImageOps.mirror(image) if is_mirrored else image
    return image.crop((left, top, left + width, top + height)), top, left


def fit_mask(row: dict, height: int, width: int, draws, center: bool, flip: bool) -> dict:
    """`{"mask": uint8 [1, H, W]}` of a row, cut out of its mask as `fit` cuts its image with the same `draws`; {} for a
    row without a mask.

    Pixels are averaged over areas: other filters would make parts grey that are far from the mask's edge.
    """
    if "mask" not in row:
        return {}
    mask, *_ = fit(row["mask"], height, width, draws, "box", center, flip)
    return {"mask": np.asarray(mask)[None]}


def scaled_part(image: Image.Image, size: tuple, part: tuple, filter) -> Image.Image:
    """A part of a scaled image, computed from that part alone.

    Args:
        size: (height, width) of the scaled image.
        part: (top, left, height, width) in it.
    """
    top, left, height, width = part
    down, across = image.height / size[0], image.width / size[1]
    right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
    return image.resize((width, height), filter, (left * across, top * down, right, bottom))


def normalize_pixels(image: Image.Image) -> np.ndarray:
    """RGB image -> float32 [3, H, W] in [-1, 1]."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0
