import numpy as np
import pytest
from PIL import Image

from ppdiffusers_train.data import transforms
from ppdiffusers_train.data.transforms import center_crop_square, fit, normalize_pixels, without_ends
from ppdiffusers_train.draws import RowDraws

pytestmark = pytest.mark.once  # no Paddle in it


def test_the_centred_square_is_kept():
    columns = np.arange(9, dtype=np.uint8)[None].repeat(4, 0)
    cropped = center_crop_square(Image.fromarray(columns))
    assert np.array(cropped)[0].tolist() == [2, 3, 4, 5] and cropped.size == (4, 4)


def test_pixels_run_from_minus_one_to_one_with_channels_first():
    pixels = normalize_pixels(Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8)))
    assert pixels.dtype == np.float32 and pixels.shape == (3, 1, 1)
    assert np.allclose(pixels.ravel(), [-1, 1, -0.6])


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(3001, 7), (7, 3001), (999, 50), (5000, 500)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_of_an_extreme_shape_only_the_crop_is_enlarged_to_the_same_pixels(monkeypatch, size, interpolation):
    for seed in range(3):
        arguments = noise(*size), 48, 64, RowDraws(0, seed), interpolation, seed == 0, True
        part, *corner = fit(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(transforms, "EXTREME", 10**9)
            whole, *expected = fit(*arguments)
        assert corner == expected and part.size == (64, 48)
        assert np.abs(np.int16(part) - np.int16(whole)).max() <= 2


def test_no_image_is_enlarged_to_much_more_than_its_crop(monkeypatch):
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *more: sizes.append(size) or resize(self, size, *more)
    )
    for ratio in (1, 7, 9, 2000):
        fit(noise(10 * ratio, 10), 256, 256, RowDraws(0, 0), "lanczos", False, False)
        fit(noise(10, 10 * ratio), 256, 256, RowDraws(0, 0), "lanczos", False, False)
    assert len(sizes) == 8 and max(width * height for width, height in sizes) <= 8 * 256 * 256


def test_the_middle_of_a_long_image_is_what_clip_crops():
    for size in ((400, 20), (20, 401)):
        image = noise(*size)
        middle, scale = without_ends(image), 56 / 20
        assert max(middle.size) <= 8 * 20 + 1
        seen, expected = (
            np.int16(center_crop_square(part.resize([round(side * scale) for side in part.size], Image.BICUBIC)))
            for part in (middle, image)
        )
        assert np.abs(seen - expected).mean() < 8
    assert without_ends(noise(160, 20)).size == (160, 20)
