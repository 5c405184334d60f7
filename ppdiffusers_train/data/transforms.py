"""Images to arrays, in NumPy and Pillow, because they run in loader workers."""

import numpy as np
from PIL import Image


def center_crop_square(image: Image.Image) -> Image.Image:
    """The largest centred square of an image, without resizing."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def normalize_pixels(image: Image.Image) -> np.ndarray:
    """RGB image -> float32 [3, H, W] in [-1, 1]."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0
