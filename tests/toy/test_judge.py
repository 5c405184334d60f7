"""The judge: right on true pictures, also on spoiled ones, and silent where there is no clear shape."""

import ppdiffusers_train  # noqa: F401

import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.toy.world.judge import accuracy, judge, parse_caption
from ppdiffusers_train.toy.world.looks import SIZES
from ppdiffusers_train.toy.world.shapes import (
    BACKGROUNDS,
    COLOURS,
    CONTENTS,
    LOOKS,
    SHAPES,
    WORDINGS,
    Content,
    Scene,
    caption,
    render,
    sample,
)
from tests.gate.confusion import confusion_table

pytestmark = pytest.mark.once  # no Paddle in it

RED_CIRCLE = Content("circle", "red", "white")


def samples(count, size, look, seed=0):
    return [sample(seed, index, size, look, held_out=index % 6 == 0) for index in range(count)]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("size", SIZES)
def test_true_pictures_are_read_right(size, look):
    for one in samples(120, size, look):
        assert judge(one.image) == (one.scene.content, look)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CONTENTS),
    st.sampled_from(LOOKS),
    st.sampled_from(SIZES),
    *(st.floats(0, 1) for _ in range(3)),
)
def test_every_place_and_size_of_every_shape_is_read_right(content, look, size, x, y, radius):
    radius = 0.24 + 0.14 * radius
    x, y = (0.0625 + radius + share * (0.875 - 2 * radius) for share in (x, y))
    assert judge(render(Scene(content, look, x, y, radius), size)) == (content, look)


def add_noise(image, random):
    return np.clip(np.asarray(image) + random.normal(0, 10, np.shape(image)), 0, 255).astype(np.uint8)


def shift_colours(image, random):
    spoiled = np.asarray(image) * random.uniform(0.92, 1.08, 3) + random.uniform(-12, 12, 3)
    return np.clip(spoiled, 0, 255).astype(np.uint8)


def as_jpeg(image, random):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return Image.open(file)


def blur(image, random):
    return image.filter(ImageFilter.GaussianBlur(image.width / 32))


@pytest.mark.parametrize("spoil", [add_noise, shift_colours, as_jpeg, blur])
def test_spoiled_pictures_are_read_right_or_not_at_all(spoil):
    random, unread, unlike = np.random.default_rng(0), 0, 0
    kinds = list(itertools.product(SIZES, LOOKS))
    for size, look in kinds:
        for one in samples(25, size, look, seed=1):
            seen = judge(spoil(one.image, random))
            assert seen.content in (one.scene.content, Content(None, None, one.scene.content.background))
            unread += seen.content.shape is None
            unlike += seen.look not in (None, look)
    assert unread <= 0.02 * 25 * len(kinds) and unlike <= 0.01 * 25 * len(kinds)


def shape_of(picture):
    """The shape that is seen; without one, no colour and no look may be named either."""
    content, look = judge(picture)
    assert (content.shape is None) == (content.colour is None) == (look is None)
    return content.shape


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SIZES), st.sampled_from((5, 20, 60)))
def test_noise_is_nothing(seed, size, sigma):
    random = np.random.default_rng(seed)
    assert judge(random.integers(0, 256, (size, size, 3), dtype=np.uint8)) == ((None, None, None), None)
    for background in BACKGROUNDS.values():
        with np.errstate(all="raise"):
            noise = random.normal(background, sigma, (size, size, 3))
            assert shape_of(np.clip(noise, 0, 255).astype(np.uint8)) is None


@pytest.mark.parametrize("name", [*BACKGROUNDS, *COLOURS])
def test_a_flat_picture_is_a_background_at_most(name):
    with np.errstate(all="raise"):
        seen = judge(Image.new("RGB", (64, 64), {**BACKGROUNDS, **COLOURS}[name]))
    assert seen == ((None, None, name if name in BACKGROUNDS else None), None)


def drawing(draw_on, fill=COLOURS["red"]):
    """A red something on white, antialiased: `draw_on(canvas, colour)` draws on 256 × 256 pixels."""
    image = Image.new("RGB", (256, 256), "white")
    draw_on(ImageDraw.Draw(image), fill)
    return image.reduce(4)


def ring(canvas, fill):
    canvas.ellipse((50, 50, 190, 190), fill)


def test_a_circle_drawn_otherwise_is_a_circle():
    assert judge(drawing(ring)) == (RED_CIRCLE, "plain")


UNKNOWN = {
    "ellipse": lambda canvas, fill: canvas.ellipse((50, 90, 190, 166), fill),
    "rectangle": lambda canvas, fill: canvas.rectangle((50, 90, 190, 166), fill),
    "rhombus": lambda canvas, fill: canvas.polygon([(120, 50), (190, 120), (120, 190), (50, 120)], fill),
    "triangle upside down": lambda canvas, fill: canvas.polygon([(50, 50), (190, 50), (120, 190)], fill),
    "half a circle": lambda canvas, fill: canvas.pieslice((50, 50, 190, 190), 0, 180, fill),
    "two circles": lambda canvas, fill: [canvas.ellipse((x, 90, x + 80, 170), fill) for x in (40, 140)],
    "two colours": lambda canvas, fill: [ring(canvas, fill), canvas.rectangle((160, 160, 230, 230), COLOURS["blue"])],
    "a speck": lambda canvas, fill: canvas.ellipse((120, 120, 140, 140), fill),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_no_shape_of_the_world_is_nothing(name):
    assert shape_of(drawing(UNKNOWN[name])) is None


@pytest.mark.parametrize("fill", [(130, 70, 20), (247, 180, 185), (128, 128, 128)], ids=["brown", "pale", "gray"])
def test_a_shape_in_no_colour_of_the_world_is_nothing(fill):
    assert shape_of(drawing(ring, fill)) is None


def test_a_small_smudge_far_away_does_not_hide_a_shape():
    image = drawing(ring)
    image.paste(COLOURS["red"], (56, 56, 62, 62))
    assert judge(image) == (RED_CIRCLE, "plain")


@pytest.mark.parametrize("size", [(48, 48), (32, 64), (16, 16)])
def test_only_squares_of_whole_blocks_are_judged(size):
    with pytest.raises(ValueError, match=f"a picture of {size[0]} x {size[1]} pixels"):
        judge(Image.new("RGB", size))


def test_all_captions_of_the_world_are_understood():
    for content, wording in itertools.product(CONTENTS, WORDINGS["en"] + WORDINGS["zh"]):
        assert parse_caption(caption(content, wording)) == content


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Red CIRCLE on grey.", ("circle", "red", "gray")),
        ("white background, and in front of it a cross, purple", ("cross", "purple", "white")),
        ("画一个蓝三角,粉红色的背景", ("triangle", "blue", "pink")),
        ("黑底橙色正方形", ("square", "orange", "black")),
    ],
)
def test_other_wordings_are_understood(text, content):
    assert parse_caption(text) == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a circle on a white background", "names no colour; expected one of red (红色), green"),
        ("a reddish circle on white", "names no colour"),
        ("a red circle and a red square on white", "names circle and square shape"),
        ("蓝色圆形", "names no background"),
    ],
)
def test_an_unclear_caption_is_one_line_that_says_what_is_missing(text, message):
    with pytest.raises(UserError) as error:
        parse_caption(text)
    assert message in str(error.value) and repr(text) in str(error.value)


def test_accuracy_counts_what_is_right_and_noise_is_never_right():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pictures = [render(Scene(RED_CIRCLE, "plain", 0.5, 0.5, 0.3), 32)] * 3 + [noise]
    prompts = [
        "a red circle on a white background",
        "白色背景上的红色正方形",
        "a blue circle on a white background",
        "a red circle on a white background",
    ]
    assert accuracy(pictures, prompts) == {"shape": 0.5, "colour": 0.5, "background": 0.75, "all": 0.25}
    assert accuracy([noise], prompts[:1]) == {"shape": 0, "colour": 0, "background": 0, "all": 0}
    table = confusion_table(pictures, prompts, "shape")
    assert table["circle"] == {**dict.fromkeys(SHAPES, 0), "circle": 2, "nothing": 1}
    assert table["square"] == {**dict.fromkeys(SHAPES, 0), "circle": 1, "nothing": 0}
    assert sum(sum(row.values()) for row in table.values()) == 4


def test_a_prompt_for_each_picture_is_needed():
    with pytest.raises(ValueError):
        accuracy([np.zeros((32, 32, 3), np.uint8)] * 2, ["a red circle on black"])
    with pytest.raises(ValueError, match="no pictures"):
        accuracy([], [])
