"""Recognises the content of pictures of `shapes.py`, without a trained model.

    judge(picture).content == parse_caption("a red circle on a white background")

The background is the colour of the picture's rim. The colour follows from the direction in which pixels differ from it.
Then every shape in every look is rendered with the picture's own centre and spread, and the best overlap wins. If
nothing fits well, the answer is None, so that noise is never right by chance.
"""

import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.toy.world.shapes import BACKGROUNDS, CHINESE, COLOURS, LOOKS, SHAPES, Content, coverage

NAMES = {"shape": SHAPES, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}
SYNONYMS = {"grey": "gray", "粉红": "粉"}

SIDE = 32  # pictures are judged at this size
PIXELS = np.arange(SIDE) + 0.5
ON_RIM = np.ones((SIDE, SIDE), bool)
ON_RIM[2:-2, 2:-2] = False
KINDS = tuple((shape, look) for shape in SHAPES for look in LOOKS)
RAMP = 2.0  # width of a rendered edge, in pixels: between a sharp and a blurred picture

# Thresholds. True pictures pass, also if slightly blurred, noisy, shifted in colour or stored as JPEG.
MAX_DISTANCE = 70.0  # of the rim's median from a background of the palette; black and white are 441 apart
MAX_UNREST = 45.0  # distance of a rim's pixel from the median, for MIN_CALM of all
MIN_CALM = 0.7
MIN_MASS = 10.0  # area of a shape, in pixels
# Cosine between picture and rendering, both as differences from the background; thin lines blur and match less exactly.
MIN_OVERLAP = {"plain": 0.93, "outlined": 0.86, "striped": 0.91}
MIN_LEAD = 0.015  # of that overlap before the best one of another shape; a rhombus and a blur have less
STRENGTH = (0.5, 1.4)  # contrast with the background, of which the palette's colour has 1
MAX_OFF_COLOUR = 60.0  # distance of a shape's colour from the line through the background and the palette's colour


class Reading(NamedTuple):
    """What is recognised in a picture; `look` and the fields of `content` are None where nothing is clear."""

    content: Content
    look: str


def judge(picture) -> Reading:
    """The content of a picture.

    Args:
        picture: RGB image of Pillow, or uint8 [N, N, 3] with N a multiple of 32.
    """
    pixels = _reduce(picture)
    background, difference = _read_background(pixels)
    if background is None:
        return Reading(Content(None, None, None), None)
    colour, direction = _read_colour(difference, background)
    shape, look = _read_shape(difference, direction)
    return Reading(Content(shape, colour if shape else None, background), look)


def parse_caption(text: str) -> Content:
    """The content of a caption, in English or Chinese: any text that names one shape, one colour and one background.

    Raises:
        UserError: a property is not named, or two of a kind are.
    """
    plain = text.lower()
    for word, usual in SYNONYMS.items():
        plain = plain.replace(word, usual)
    words = {*re.findall(r"[a-z]+", plain)}
    asked = {}
    for field, names in NAMES.items():
        found = [name for name in names if name in words or CHINESE[name].rstrip("色形") in plain]
        if len(found) != 1:
            expected = ", ".join(f"{name} ({CHINESE[name]})" for name in names)
            raise UserError(
                f"the caption {text!r} names {' and '.join(found) or 'no'} {field}; expected one of {expected}"
            )
        asked[field] = found[0]
    return Content(**asked)


def accuracy(pictures, prompts) -> dict:
    """Shares of pictures that show what their prompts name: `shape`, `colour`, `background`, and `all` three."""
    asked, seen = _asked_and_seen(pictures, prompts)
    right = np.array(asked) == np.array(seen)
    return {**dict(zip(Content._fields, right.mean(0).tolist())), "all": float(right.all(1).mean())}


def look_shares(pictures) -> dict:
    """Shares of pictures in each of `LOOKS`."""
    seen = [judge(picture).look for picture in pictures]
    return {look: seen.count(look) / len(seen) for look in LOOKS}


def _asked_and_seen(pictures, prompts):
    pairs = [(parse_caption(prompt), judge(picture).content) for picture, prompt in zip(pictures, prompts, strict=True)]
    if not pairs:
        raise ValueError("no pictures to judge")
    return zip(*pairs)


def _reduce(picture) -> np.ndarray:
    """Means over square blocks of pixels: float [SIDE, SIDE, 3]."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    block = max(image.width // SIDE, 1)
    if image.size != (SIDE * block, SIDE * block):
        raise ValueError(f"a picture of {image.width} x {image.height} pixels; expected a square of {SIDE}, 64, 96, …")
    return np.asarray(image.convert("RGB").reduce(block), dtype=float)


def _read_background(pixels):
    """The background's name, None where it is not clear, and how pixels differ from its colour: [SIDE, SIDE, 3]."""
    rim = pixels[ON_RIM]
    found = np.median(rim, axis=0)
    distances = np.linalg.norm([*BACKGROUNDS.values(), *COLOURS.values()] - found, axis=1)
    nearest = distances.argmin()
    calm = np.mean(np.linalg.norm(rim - found, axis=1) < MAX_UNREST)
    clear = nearest < len(BACKGROUNDS) and distances[nearest] < MAX_DISTANCE and calm > MIN_CALM
    return (list(BACKGROUNDS)[nearest] if clear else None), pixels - found


def _read_colour(difference, background):
    """The colour that explains most of the differences, and its own difference from the background: [3].

    Edges and pale bands are mixtures: they differ from the background less than the colour does, in its direction.
    """
    directions = np.array(list(COLOURS.values()), dtype=float) - BACKGROUNDS[background]
    lengths = np.linalg.norm(directions, axis=1)
    explained = np.square(np.maximum(difference @ directions.T / lengths, 0)).sum((0, 1))
    best = explained.argmax()
    return list(COLOURS)[best], directions[best]


def _read_shape(difference, direction):
    """(shape, look) of the rendering that overlaps best with the differences, or (None, None)."""
    share = difference @ direction / (direction @ direction)  # 0 on the background, 1 on the shape
    renderings = _render_over(share)
    if renderings is None:
        return None, None
    overlaps = _overlaps(share, renderings) * np.linalg.norm(direction) / np.linalg.norm(difference)
    best = overlaps.argmax()
    shape, look = KINDS[best]
    lead = overlaps[best] - max(overlap for overlap, kind in zip(overlaps, KINDS) if kind[0] != shape)
    rendering = renderings[best]
    colour = np.tensordot(rendering, difference) / np.square(rendering).sum()  # of least squares, less the background
    strength = colour @ direction / (direction @ direction)
    clear = (
        overlaps[best] > MIN_OVERLAP[look]
        and lead > MIN_LEAD
        and STRENGTH[0] < strength < STRENGTH[1]
        and np.linalg.norm(colour - strength * direction) < MAX_OFF_COLOUR
    )
    return (shape, look) if clear else (None, None)


def _render_over(share):
    """Coverages of all kinds with the centre and spread of `share`: [kinds, SIDE, SIDE], or None where it is empty."""
    mass = np.where(share > 0.25, np.minimum(share, 1), 0)
    for _ in range(2):
        if mass.sum() < MIN_MASS:
            return None
        centre, spread = _moments(mass)
        places = [(*(centre - offset * spread / width), spread / width) for offset, width in UNIT_MOMENTS]
        renderings = np.stack([coverage(*kind, *place, SIDE, RAMP) for kind, place in zip(KINDS, places)])
        x, y, radius = places[_overlaps(share, renderings).argmax()]
        near = (abs(PIXELS - x) < 1.3 * radius) & (abs(PIXELS[:, None] - y) < 1.3 * radius)
        if not mass[~near].any():
            break
        mass = mass * near  # once more, without a distant smudge that has shifted the centre
    return renderings


def _overlaps(share, renderings):
    """Products of `share` with each rendering, divided by the rendering's norm: [kinds]."""
    return (renderings * share).sum((1, 2)) / np.linalg.norm(renderings, axis=(1, 2))


def _moments(mass):
    """Centre (x, y) of a distribution of mass over pixels, and the root of its mean squared distance from there."""
    columns, rows = mass.sum(0) / mass.sum(), mass.sum(1) / mass.sum()
    pixels = np.arange(len(mass)) + 0.5
    x, y = columns @ pixels, rows @ pixels
    return np.array([x, y]), np.sqrt(columns @ (pixels - x) ** 2 + rows @ (pixels - y) ** 2)


def _unit_moments(kind):
    """`_moments` of a kind of rendering with its middle at 0 and a radius of 1."""
    centre, spread = _moments(coverage(*kind, 48, 48, 40, 96))
    return (centre - 48) / 40, spread / 40


UNIT_MOMENTS = [_unit_moments(kind) for kind in KINDS]
