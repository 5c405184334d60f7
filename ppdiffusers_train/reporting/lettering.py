"""Text in any script that a font of the machine has, for sheets of pictures.

Pillow's own font has Latin letters; all others come from the first of the system's fonts that has them, letter by
letter, as few fonts have more than some scripts. A letter that no font has is shown as an escape such as \\u732b.
"""

import functools
import os
import sys
import unicodedata
from pathlib import Path

from PIL import ImageFont

from ppdiffusers_train.errors import one_line
from ppdiffusers_train.reporting.status_line import print_line

# These are looked at first: sans serif, with many letters each.
PREFERRED = """DejaVuSans.ttf NotoSans-Regular.ttf NotoSansCJK-Regular.ttc NotoSansCJKsc-Regular.otf
SourceHanSansSC-Regular.otf SourceHanSansCN-Regular.otf wqy-microhei.ttc wqy-zenhei.ttc DroidSansFallbackFull.ttf
msyh.ttc simhei.ttf PingFang.ttc Arial Unicode.ttf""".split()
SPECIAL_STYLES = ("bold", "italic", "oblique", "mono", "serif", "condensed", "light", "thin", "black")
NOTHING = "\U0010ffff"  # no letter, so it is shown as a font shows those that it lacks
JOINER = "\u200d"
SAID = []  # a letter without a font, when a line has been printed about it


class Lettering:
    """The fonts of some lines of text, for drawing them at one size.

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
        """A line as it is drawn: with escapes for letters that no font has."""
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
        """[[font, letters of that font that stand side by side]]."""
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
    """A letter's code as Python writes it."""
    return cluster.encode("unicode_escape").decode()


def choose_fonts(wanted: set, own, size: int) -> dict:
    """`{cluster: font}`, or None where no font has it, which is said once."""
    chosen = {cluster: own for cluster in wanted if has(own, cluster)}
    missing = wanted - set(chosen)
    for path in font_files(font_folders()) if missing else ():
        font = load(path, size)
        found = {cluster for cluster in missing if font and has(font, cluster)}
        chosen.update(dict.fromkeys(found, font))
        missing -= found
        if not missing:
            break
    if missing and not SAID:
        SAID.append(min(missing))
        print_line(
            f"no font of this system has {len(missing)} of the letters of texts below images; they are shown as codes "
            f"such as {escaped(SAID[0])}; a package of fonts, such as Noto, has them"
        )
    return {**chosen, **dict.fromkeys(missing)}


def has(font, cluster: str) -> bool:
    """Whether a font has all letters of a cluster that can be seen."""
    return all(
        is_invisible(letter) or ord(letter) < 127 or glyph(font, letter) != glyph(font, NOTHING) for letter in cluster
    )


def is_invisible(letter: str) -> bool:
    """Whether a character is a space, joins others, or only chooses between looks of the letter before it."""
    return unicodedata.category(letter) in ("Cf", "Zs") or "\ufe00" <= letter <= "\ufe0f"


def glyph(font, letter: str) -> tuple:
    """What a font draws for a letter, to compare."""
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


@functools.lru_cache(maxsize=64)
def load(path: str, size: int):
    """A font, or None for files that Pillow cannot draw in this size, such as coloured emoji."""
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
