import numpy as np
import pytest
from PIL import Image

from ppdiffusers_train.data.transforms import center_crop_square, normalize_pixels

pytestmark = pytest.mark.once  # no Paddle in it


def test_the_centred_square_is_kept():
    columns = np.arange(9, dtype=np.uint8)[None].repeat(4, 0)
    cropped = center_crop_square(Image.fromarray(columns))
    assert np.array(cropped)[0].tolist() == [2, 3, 4, 5] and cropped.size == (4, 4)


def test_pixels_run_from_minus_one_to_one_with_channels_first():
    pixels = normalize_pixels(Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8)))
    assert pixels.dtype == np.float32 and pixels.shape == (3, 1, 1)
    assert np.allclose(pixels.ravel(), [-1, 1, -0.6])
