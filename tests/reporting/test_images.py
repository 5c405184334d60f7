import pytest
from PIL import Image

from ppdiffusers_train.reporting.images import LINE, MARGIN, captioned_grid

pytestmark = pytest.mark.once  # no Paddle in it

COLOURS = [["red", "green"], ["blue", "white"]]


def test_each_picture_stands_in_its_row_and_column():
    rows = [[Image.new("RGB", (8, 6), colour) for colour in row] for row in COLOURS]
    grid = captioned_grid(rows, ["one", "two"], scale=2)
    assert grid.size == (MARGIN + 2 * (16 + MARGIN), MARGIN + 2 * (12 + LINE + MARGIN))
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            left, top = MARGIN + j * (16 + MARGIN), MARGIN + i * (12 + LINE + MARGIN) + LINE
            for corner in ((left, top), (left + 15, top + 11)):
                assert grid.getpixel(corner) == image.getpixel((0, 0))


def test_captions_are_drawn_and_long_or_chinese_ones_do_no_harm():
    row = [[Image.new("RGB", (30, 8), "white")]]
    plain = captioned_grid(row, [""])
    for caption in ("a cat", "a very long caption " * 20, "一只坐在椅子上的猫"):
        captioned = captioned_grid(row, [caption])
        assert captioned.size == (plain.width, plain.height + LINE)
        assert captioned.getcolors() != [(captioned.width * captioned.height, (255, 255, 255))]
