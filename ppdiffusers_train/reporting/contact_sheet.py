"""Pictures with text below them on one sheet. A picture's pixel becomes a whole number of pixels."""

import math
import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ppdiffusers_train.reporting.lettering import Lettering

GAP, SPACING = 8, 2  # pixels between tiles and between lines
NARROWEST = 256  # pixels of a tile's width, so that text fits; smaller pictures are enlarged up to it


@dataclass
class Tile:
    """Pictures that stand side by side, and lines of text below them."""

    pictures: list
    lines: list

    def size(self, scale: int) -> tuple:
        """Width and height of the pictures on a sheet."""
        width = sum(picture.width * scale + GAP for picture in self.pictures) - GAP
        return width, max(picture.height for picture in self.pictures) * scale


@dataclass
class Sheet:
    """A finished sheet. `places[i][j]` is (left, top) of picture j of tile i; a pixel of it is `scale` pixels wide."""

    image: Image.Image
    places: list
    scale: int


def contact_sheet(tiles: list, columns=None) -> Sheet:
    """Lay out tiles in rows. Characters that no installed font has are shown as escapes.

    Args:
        columns: tiles per row; by default about as many as there are rows.
    """
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    scale = max(1, NARROWEST // max(tile.size(1)[0] for tile in tiles))
    width = max(NARROWEST, *(tile.size(scale)[0] for tile in tiles))
    font = Lettering([line for tile in tiles for line in tile.lines], max(12, width // 40))
    texts = [[part for line in tile.lines for part in wrap(font.shown(line), font, width)] for tile in tiles]
    line_height = font.height + SPACING
    heights = [tile.size(scale)[1] + line_height * len(text) for tile, text in zip(tiles, texts)]
    tops = [GAP]  # of the rows of tiles, and where the last one ends
    for start in range(0, len(tiles), columns):
        tops.append(tops[-1] + max(heights[start : start + columns]) + 2 * GAP)

    sheet = Image.new("RGB", (GAP + columns * (width + 2 * GAP), tops[-1]), "white")
    canvas, places = ImageDraw.Draw(sheet), []
    for index, (tile, text) in enumerate(zip(tiles, texts)):
        edge, top = GAP + index % columns * (width + 2 * GAP), tops[index // columns]
        left, here = edge, []
        for picture in tile.pictures:
            here.append((left, top))
            enlarged = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, top))
            left += enlarged.width + GAP
        places.append(here)
        for number, line in enumerate(text):
            font.draw(canvas, edge, top + tile.size(scale)[1] + SPACING + number * line_height, line)
    return Sheet(sheet, places, scale)


def wrap(line: str, font, width: int) -> list:
    """A line as several lines of at most `width` pixels."""
    letters = max(1, len(line))
    while True:
        parts = textwrap.wrap(line, letters) or [""]
        widest = max(font.getlength(part) for part in parts)
        if widest <= width or letters == 1:
            return parts
        letters = min(letters - 1, int(letters * width / widest) + 1)
