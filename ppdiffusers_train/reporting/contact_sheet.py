"""Pictures with text below them on one sheet. A picture's pixel becomes a whole number of pixels."""

import math
import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP, SPACING = 8, 2  # pixels between tiles and between lines
NARROWEST = 256  # pixels of a tile's width, so that text fits; smaller pictures are enlarged up to it
# Pillow's own font has Latin letters only. For other texts the first of these fonts that the system has is used.
FONTS = """NotoSansCJK-Regular.ttc NotoSansCJKsc-Regular.otf SourceHanSansSC-Regular.otf SourceHanSansCN-Regular.otf
wqy-microhei.ttc wqy-zenhei.ttc DroidSansFallbackFull.ttf msyh.ttc simhei.ttf PingFang.ttc DejaVuSans.ttf""".split()


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
    """Lay out tiles in rows. Text that the available fonts cannot show never raises an error.

    Args:
        columns: tiles per row; by default about as many as there are rows.
    """
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    scale = max(1, NARROWEST // max(tile.size(1)[0] for tile in tiles))
    width = max(NARROWEST, *(tile.size(scale)[0] for tile in tiles))
    texts, font = choose_font([tile.lines for tile in tiles], max(12, width // 40))
    texts = [[part for line in lines for part in wrap(line, font, width)] for lines in texts]
    line_height = sum(font.getmetrics()) + SPACING
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
            canvas.text((edge, top + tile.size(scale)[1] + SPACING + number * line_height), line, "black", font)
    return Sheet(sheet, places, scale)


def choose_font(texts: list, size: int) -> tuple:
    """A font of `size` pixels for lists of lines, and the lines without the letters that it lacks: (lines, font)."""
    texts = [[" ".join(line.split()) for line in lines] for lines in texts]
    if not all(is_latin(line) for lines in texts for line in lines):
        for name in FONTS:
            try:
                return texts, ImageFont.truetype(name, size)
            except OSError:
                continue
    latin = [[line.encode("latin-1", "replace").decode("latin-1") for line in lines] for lines in texts]
    return latin, ImageFont.load_default(size)


def is_latin(text: str) -> bool:
    """Whether Pillow's own font has all letters of a text."""
    return all(ord(letter) < 256 for letter in text)


def wrap(line: str, font, width: int) -> list:
    """A line as several lines of at most `width` pixels."""
    letters = max(1, len(line))
    while True:
        parts = textwrap.wrap(line, letters) or [""]
        widest = max(font.getlength(part) for part in parts)
        if widest <= width or letters == 1:
            return parts
        letters = min(letters - 1, int(letters * width / widest) + 1)
