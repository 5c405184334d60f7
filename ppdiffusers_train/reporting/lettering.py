"""Text in any script that an installed font covers, for sheets of pictures.

Pillow's own font has Latin letters. Every other character is drawn with the first system font that has it, because most
fonts cover only a few scripts. A character that no font has is shown as an escape such as \\u732b.
"""

import functools
import os
import sys
import unicodedata
from pathlib import Path

from PIL import ImageFont

from ppdiffusers_train.errors import one_line
from ppdiffusers_train.reporting.status_line import print_line

# These are tried first: sans serif, with many characters each.
PREFERRED = """DejaVuSans.ttf NotoSans-Regular.ttf NotoSansCJK-Regular.ttc NotoSansCJKsc-Regular.otf
SourceHanSansSC-Regular.otf SourceHanSansCN-Regular.otf wqy-microhei.ttc wqy-zenhei.ttc DroidSansFallbackFull.ttf
msyh.ttc simhei.ttf PingFang.ttc Arial Unicode.ttf""".split()
SPECIAL_STYLES = ("bold", "italic", "oblique", "mono", "serif", "condensed", "light", "thin", "black")
NOTHING = "\U0010ffff"  # not a character, so a font draws it as it draws those that it lacks
JOINER = "\u200d"
REPORTED = []  # a character without a font, once a line about it has been printed


class Lettering:
    """The fonts for some lines of text, and functions that draw these lines in one size.

    Args:
        lines: texts, which are drawn on one line each.
        size: in pixels.
    """

    def __init__(self, lines, size: int):
        self.size, self.own = size, ImageFont.load_default(size)
        self.fonts = choose_fonts({cluster for line in lines for cluster in clusters(tidied(line))}, self.own, size)
        metrics = [font.getmetrics() for font in {self.own, *filter(None, self.fonts.values())}]
        self.ascent, descent = (max(part) for part in zip(*metrics))
        self.height = self.ascent + descent

    def shown(self, line: str) -> str:
        """A line as it is drawn: with escapes for characters that no font has."""
        return "".join(cluster if self.fonts[cluster] else escaped(cluster) for cluster in clusters(tidied(line)))

    def getlength(self, text: str) -> float:
        """The width of a part of a shown line, in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def draw(self, canvas, left: int, top: int, text: str) -> None:
        """Draw a part of a shown line in black."""
        for font, run in self._runs(text):
            canvas.text((left, top + self.ascent), run, "black", font, anchor="ls")
            left += font.getlength(run)

    def _runs(self, text: str) -> list:
        """[[font, neighbouring characters that are drawn with it]]."""
        runs = []
        for cluster in clusters(text):
            font = self.fonts.get(cluster) or self.own
            if runs and runs[-1][0] is font:
                runs[-1][1] += cluster
            else:
                runs.append([font, cluster])
        return runs


def tidied(line: str) -> str:
    """A line with single spaces, and without control characters."""
    return one_line(" ".join(line.split()))


def clusters(text: str) -> list:
    """A text as letters with the marks that belong to them, and joined emoji as one."""
    found = []
    for letter in text:
        if found and (unicodedata.category(letter).startswith("M") or JOINER in (letter, found[-1][-1])):
            found[-1] += letter
        else:
            found.append(letter)
    return found


def escaped(cluster: str) -> str:
    """A character as Python escapes it."""
    return cluster.encode("unicode_escape").decode()


def choose_fonts(wanted: set, own, size: int) -> dict:
    """`{cluster: font}`, with None where no font has it; a line about these is printed once."""
    chosen = {cluster: own for cluster in wanted if has(own, cluster)}
    missing = wanted - set(chosen)
    for path in font_files(font_folders()) if missing else ():
        font = load(path, size)
        found = {cluster for cluster in missing if font and has(font, cluster)}
        chosen.update(dict.fromkeys(found, font))
        missing -= found
        if not missing:
            break
    if missing and not REPORTED:
        REPORTED.append(min(missing))
        print_line(
            f"no installed font has {len(missing)} of the characters in the texts below images; they are shown as "
            f"codes such as {escaped(REPORTED[0])}; install a font package that has them, such as Noto"
        )
    return {**chosen, **dict.fromkeys(missing)}


def has(font, cluster: str) -> bool:
    """Whether a font has all visible characters of a cluster."""
    return all(
        is_invisible(letter) or ord(letter) < 127 or glyph(font, letter) != glyph(font, NOTHING) for letter in cluster
    )


def is_invisible(letter: str) -> bool:
    """Whether a character is a space, a joiner, or a selector of a variant of the character before it."""
    return unicodedata.category(letter) in ("Cf", "Zs") or "\ufe00" <= letter <= "\ufe0f"


def glyph(font, letter: str) -> tuple:
    """The pixels that a font draws for a character, for comparison."""
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


@functools.lru_cache(maxsize=64)
def load(path: str, size: int):
    """A font, or None for a file that Pillow cannot use at this size, such as coloured emoji."""
    try:
        return ImageFont.truetype(path, size)
    except OSError:
        return None


def font_folders() -> tuple:
    """The folders in which the system has fonts."""
    home = Path.home()
    if sys.platform == "darwin":
        return "/System/Library/Fonts", "/Library/Fonts", str(home / "Library/Fonts")
    if sys.platform == "win32":
        return (os.path.join(os.environ.get("WINDIR", r"C:\Windows"), "Fonts"),)
    places = (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
    return tuple(f"{place}/fonts" for place in (os.environ.get("XDG_DATA_HOME") or f"{home}/.local/share", *places))


@functools.lru_cache(maxsize=4)
def font_files(folders: tuple) -> list:
    """The paths of all fonts in folders, the preferred ones first, and those of special styles last."""
    endings = (".ttf", ".otf", ".ttc", ".otc")
    walks = [walk for folder in folders for walk in os.walk(folder, followlinks=True)]
    found = [os.path.join(place, name) for place, _, names in walks for name in names if name.lower().endswith(endings)]

    def rank(path):
        name = os.path.basename(path)
        place = PREFERRED.index(name) if name in PREFERRED else len(PREFERRED)
        return place, any(style in name.lower() for style in SPECIAL_STYLES), name

    return sorted(found, key=rank)
