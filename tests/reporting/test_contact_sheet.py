"""Sheets of pictures with text, as `preview` and validation write them."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont

from ppdiffusers_train.reporting import lettering
from ppdiffusers_train.reporting.contact_sheet import Tile, contact_sheet, wrap
from ppdiffusers_train.reporting.lettering import Lettering, clusters, font_files, font_folders

pytestmark = pytest.mark.once  # no Paddle in it

HARD_TO_SHOW = ("", "图像的标题", "кошка", "two\nlines", "\ud800", "👍")


@pytest.fixture(params=[False, True], ids=["no font", "a Chinese font"])
def has_chinese_font(request, tmp_path, monkeypatch):
    """A system with a font that has 一 and 二, or with no fonts at all."""
    for name in ("XDG_DATA_HOME", "XDG_DATA_DIRS"):
        monkeypatch.setenv(name, str(tmp_path))
    if request.param:
        (tmp_path / "fonts").mkdir()
        write_font(tmp_path / "fonts" / "simhei.ttf", {".notdef": [], "one": [400], "two": [200, 600]}, "一二")
    return request.param


def write_font(file, bars: dict, letters: str):
    """A font whose glyphs are level bars at some heights; `letters` are shown by those after the first."""
    glyphs = {}
    for name, heights in bars.items():
        pen = TTGlyphPen(None)
        for height in heights:
            pen.moveTo((50, height))
            for corner in ((50, height + 100), (950, height + 100), (950, height)):
                pen.lineTo(corner)
            pen.closePath()
        glyphs[name] = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(bars))
    builder.setupCharacterMap(dict(zip(map(ord, letters), list(bars)[1:])))
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (1000, 50) for name in bars})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({})
    builder.setupOS2()
    builder.setupPost()
    builder.save(file)


def below(sheet):
    """The part of a sheet with one picture of 30 x 8 pixels that holds its text."""
    return np.asarray(sheet.image)[sheet.places[0][0][1] + 8 * sheet.scale :]


def test_letters_are_shown_where_the_system_has_a_font_for_them_and_else_as_codes(has_chinese_font, capsys):
    lettering.REPORTED.clear()
    picture = Image.new("RGB", (30, 8), "white")
    one, two, code = (contact_sheet([Tile([picture], [text])], columns=1) for text in ("一", "二", "\\u4e8c"))
    assert one.image.size == two.image.size and np.any(below(one) != 255) and np.any(below(one) != below(two))
    assert np.array_equal(below(two), below(code)) != has_chinese_font
    font = Lettering(["a 一三", "\x1b二"], 12)
    assert font.shown("a 一三") == ("a 一\\u4e09" if has_chinese_font else "a \\u4e00\\u4e09")
    assert font.shown("\x1b二").startswith("\\x1b")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and f"such as \\u4e0{9 if has_chinese_font else 0};" in said[0], "once, of whatever sheet"


def test_a_mark_stays_with_its_letter_and_joined_emoji_stay_one():
    assert clusters("ae\u0301b👨\u200d👩❤\ufe0f") == ["a", "e\u0301", "b", "👨\u200d👩", "❤\ufe0f"]


def test_every_letter_is_shown_that_a_font_of_this_machine_has():
    files = [file for file in font_files(font_folders()) if lettering.load(file, 20)]
    if not files:
        pytest.skip("this machine has no fonts")
    letters = "aéжΩ猫图한あقحहแა👍❤☺∑→\uf8ff"
    tables = [TTFont(file, fontNumber=0, lazy=True).getBestCmap() for file in files]
    expected = {letter for letter in letters if letter in "aé" or any(ord(letter) in table for table in tables)}
    font = Lettering([letters], 20)
    shown = {letter for letter in clusters(letters) if font.fonts[letter]}
    assert shown == expected


def test_any_text_can_be_laid_out(has_chinese_font):
    pictures = [Image.new("RGB", (20, 30), "red"), Image.new("RGB", (40, 10), "blue")]
    for text in HARD_TO_SHOW:
        sheet = contact_sheet([Tile(pictures, [text, ""]), Tile(pictures[:1], [text])])
        assert sheet.scale == 3 and sheet.image.getpixel(sheet.places[0][1]) == (0, 0, 255)


def test_long_lines_are_wrapped_to_the_width():
    font = ImageFont.load_default(14)
    line = "a caption with a " + "very" * 40 + " long word"
    parts = wrap(line, font, 200)
    assert "".join(parts).replace(" ", "") == line.replace(" ", "")
    assert len(parts) > 2 and max(font.getlength(part) for part in parts) <= 200


@pytest.mark.parametrize(("columns", "width", "scale"), [(None, 80, 1), (1, 300, 1), (1, 20, 5)])
def test_each_picture_stands_at_its_place_and_keeps_its_pixels(columns, width, scale):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 2, 6, width, 3), dtype=np.uint8)
    tiles = [Tile(list(map(Image.fromarray, row)), ["one", "two"]) for row in pixels]
    sheet = contact_sheet(tiles, columns)
    assert sheet.scale == scale
    assert len({left for places in sheet.places for left, _ in places}) == 2 * (columns or 3)
    for row, places in zip(pixels, sheet.places):
        for picture, (left, top) in zip(row, places):
            shown = np.asarray(sheet.image)[top : top + 6 * scale, left : left + width * scale]
            assert np.array_equal(shown, picture.repeat(scale, 0).repeat(scale, 1))


def test_without_text_no_room_is_left_for_it():
    picture = Image.new("RGB", (30, 8), "red")
    bare, captioned = (contact_sheet([Tile([picture], lines)]).image.height for lines in ([], ["a cat"]))
    assert bare < captioned
