"""Pictures of a small world, rendered by a program: one coloured shape on a coloured background, with a caption.

    sample(seed=0, index=17, size=32)  # an image, "a red circle on a white background", and its content

Endless and repeatable: a sample is a pure function of its seed and its index. A sixth of all combinations of shape,
colour and background is held out of training data, so that a model can be tested on unseen combinations.
"""

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

from ppdiffusers_train.draws import generator
from ppdiffusers_train.toy.world.looks import LOOKS

SHAPES = ("circle", "square", "triangle", "cross")

# RGB. Every colour is far from every background and from the other colours, also if they are blurred.
COLOURS = {
    "red": (220, 20, 40),
    "green": (20, 160, 60),
    "blue": (30, 70, 225),
    "yellow": (255, 225, 0),
    "purple": (145, 30, 185),
    "orange": (255, 125, 0),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (160, 160, 160),
    "pink": (255, 170, 200),
    "cyan": (150, 230, 245),
}

CHINESE = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "cross": "十字形",
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
    "white": "白色",
    "black": "黑色",
    "gray": "灰色",
    "pink": "粉色",
    "cyan": "青色",
}
WORDINGS = {
    "en": (
        "{a} {colour} {shape} on a {background} background",
        "{a} {colour} {shape} on {background}",
        "a picture of {a} {colour} {shape} on a {background} background",
        "a {background} background with {a} {colour} {shape}",
        "{colour} {shape}, {background} background",
    ),
    "zh": (
        "{background}背景上的{colour}{shape}",
        "{background}背景上有一个{colour}的{shape}",
        "一个{colour}的{shape}，背景是{background}",
        "{colour}{shape}，{background}背景",
    ),
}

RADIUS = (0.24, 0.38)  # half the width of a shape, as a share of the picture's side
MARGIN = 1 / 16  # smallest distance of a shape from every side, as a share of it
STROKE = 1 / 4  # width of an outline, in radii
BANDS = 5  # of a striped shape, every second one pale
PALE = 0.35  # share of the colour in a pale band; at 0, a striped cross would fall apart into lines
ARM = 3 / 7  # half the width of a cross's arm, in radii
NAMELESS = 60  # smallest RGB distance of a colour without a name from every colour with one
CONTRAST = 130  # smallest RGB distance of the two colours of a picture; with names it is 134 or more


class Content(NamedTuple):
    """The content of a caption or picture. A field is None if a caption does not name it, or the judge is not sure."""

    shape: str
    colour: str
    background: str


class Paints(NamedTuple):
    """The colours of a picture, RGB from 0 to 255."""

    colour: tuple
    background: tuple


class Scene(NamedTuple):
    """All that a picture shows; `x`, `y` (of the centre, from the top left) and `radius` are shares of its side.

    `paints` are colours that no caption names; `content` has no colours then.
    """

    content: Content
    look: str
    x: float
    y: float
    radius: float
    paints: Paints | None = None

    def rgb(self) -> Paints:
        """The colours that it is painted with."""
        return self.paints or Paints(COLOURS[self.content.colour], BACKGROUNDS[self.content.background])


class Sample(NamedTuple):
    """A picture, its caption, and what it shows."""

    image: Image.Image
    caption: str
    scene: Scene


def is_held_out(content: Content) -> bool:
    """Whether training data never has this combination.

    One colour of six for each pair of shape and background; every pair of two properties does occur in training.
    """
    shape = SHAPES.index(content.shape)
    colour = list(COLOURS).index(content.colour)
    background = list(BACKGROUNDS).index(content.background)
    return (shape + colour + background) % len(COLOURS) == 0


CONTENTS = tuple(itertools.starmap(Content, itertools.product(SHAPES, COLOURS, BACKGROUNDS)))
HELD_OUT = tuple(content for content in CONTENTS if is_held_out(content))
SEEN = tuple(content for content in CONTENTS if not is_held_out(content))


def sample(
    seed: int, index: int, size: int = 32, look: str = "plain", held_out: bool = False, nameless: bool = False
) -> Sample:
    """Sample `index` of the endless data of `seed`. Size and look change neither scene nor caption.

    Args:
        seed, index: whole numbers from 0 on.
        size: height and width of the image, in pixels.
        look: one of `LOOKS`.
        held_out: whether to sample the combinations that are held out of training, or the others.
        nameless: whether to paint the same scene with colours that no caption names; its caption is empty then.
    """
    random = generator(seed, index, "shapes")
    contents = HELD_OUT if held_out else SEEN
    content = contents[random.integers(len(contents))]
    radius = random.uniform(*RADIUS)
    x, y = random.uniform(MARGIN + radius, 1 - MARGIN - radius, 2)
    wordings = WORDINGS[("en", "zh")[random.integers(2)]]
    scene = Scene(content, look, x, y, radius)
    text = caption(content, wordings[random.integers(len(wordings))])
    if nameless:
        scene, text = without_names(scene, generator(seed, index, "nameless")), ""
    return Sample(Image.fromarray(render(scene, size)), text, scene)


def without_names(scene: Scene, random: np.random.Generator) -> Scene:
    """`scene` in two random colours that no caption names and that differ clearly from one another."""
    named = np.array([*COLOURS.values(), *BACKGROUNDS.values()])
    while True:
        both = random.integers(0, 256, (2, 3))
        from_named = np.linalg.norm(both[:, None] - named, axis=-1).min()
        if from_named >= NAMELESS and np.linalg.norm(both[0] - both[1]) >= CONTRAST:
            content = scene.content._replace(colour=None, background=None)
            return scene._replace(content=content, paints=Paints(*(tuple(paint) for paint in both.tolist())))


def caption(content: Content, wording: str = WORDINGS["en"][0]) -> str:
    """`content` in one of the `WORDINGS`."""
    if wording in WORDINGS["zh"]:
        return wording.format(**{field: CHINESE[name] for field, name in content._asdict().items()})
    return wording.format(a="an" if content.colour[0] in "aeiou" else "a", **content._asdict())


def render(scene: Scene, size: int) -> np.ndarray:
    """The picture of a scene, antialiased: uint8 [size, size, 3]."""
    colour, background = np.array(scene.rgb(), float)
    share = coverage(scene.content.shape, scene.look, scene.x * size, scene.y * size, scene.radius * size, size)
    return np.rint(background + share[..., None] * (colour - background)).astype(np.uint8)


def coverage(shape: str, look: str, x, y, radius, size: int, ramp: float = 1.0) -> np.ndarray:
    """How much of each pixel a shape covers, from 0 to 1.

    Args:
        x, y, radius: centre and half width, in pixels.
        ramp: width of an edge, in pixels; above 1 it is blurred.
    Returns:
        [size, size].
    """
    pixels = np.arange(size) + 0.5
    right, down = pixels - x, pixels[:, None] - y
    distance = signed_distance(shape, right, down, radius)
    if look == "plain":
        return _inside(distance, ramp)
    if look == "outlined":
        return _inside(np.maximum(distance, -distance - STROKE * radius), ramp)
    if look == "striped":
        band = 2 * radius / BANDS
        from_full_band = abs((down + radius + band / 2) % (2 * band) - band) - band / 2
        return PALE * _inside(distance, ramp) + (1 - PALE) * _inside(np.maximum(distance, from_full_band), ramp)
    raise ValueError(f"{look!r} is not one of {', '.join(LOOKS)}")


def signed_distance(shape: str, right, down, radius):
    """Distance to the edge of a shape, in pixels, negative inside; outside a corner, to the farther of its sides."""
    if shape == "circle":
        return np.sqrt(right**2 + down**2) - radius
    if shape == "square":
        return np.maximum(abs(right), abs(down)) - radius
    if shape == "triangle":  # as high as wide, with the tip at the top
        return np.maximum((2 * abs(right) - down - radius) / np.sqrt(5), down - radius)
    if shape == "cross":
        arm = ARM * radius
        upright, level = (np.maximum(abs(right) - w, abs(down) - h) for w, h in ((arm, radius), (radius, arm)))
        return np.minimum(upright, level)
    raise ValueError(f"{shape!r} is not one of {', '.join(SHAPES)}")


def _inside(distance, ramp):
    """The share of a pixel inside an edge of width `ramp` at this signed distance from the pixel's centre."""
    return np.clip(0.5 - distance / ramp, 0.0, 1.0)
