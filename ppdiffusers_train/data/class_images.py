"""Images of a class beside those of a subject: training on both keeps what the model knows of the class.

Prior preservation (Ruiz et al. 2022, arXiv 2208.12242, section 3.2): the loss is the mean over the samples, plus a
weight times the mean over as many class images, which the base model has generated.
"""

import contextlib
import os
import re
from pathlib import Path

import numpy as np

from ppdiffusers_train.data.folder_files import is_image, walk
from ppdiffusers_train.data.inspection import NOTHING
from ppdiffusers_train.data.rows import Rows, content_digest, stamp_of
from ppdiffusers_train.errors import BadSampleError

GENERATED = re.compile(r"class-\d{6}\.png")


def generated_name(number: int) -> str:
    """The file name of the generated image of this number."""
    return f"class-{number:06}.png"


def is_generated(name: str) -> bool:
    """Whether a file name, relative to the folder of class images, is that of a generated one."""
    return GENERATED.fullmatch(name) is not None


def class_images(folder: Path, count: int) -> tuple:
    """The class images of a run in `folder`, which need not exist.

    Images that are there come first, in the order of their paths; what is missing to `count` is generated.

    Returns:
        (names of all, relative to the folder; the numbers of those that are still to be generated).
    """
    found = list(filter(is_image, walk(str(folder)))) if folder.exists() else []
    given = [name for name in found if not is_generated(name)][:count]
    numbers = range(count - len(given))
    generated = set(found)
    missing = [number for number in numbers if generated_name(number) not in generated]
    return given + list(map(generated_name, numbers)), missing


class ClassImages(Rows):
    """Images of a folder that all have one caption.

    Args:
        names: of the files, relative to the folder.
    """

    def __init__(self, folder: str, names: list, caption: str):
        super().__init__("text")
        self.folder, self.names, self.caption = folder, names, caption

    def __len__(self):
        return len(self.names)

    def name(self, index: int) -> str:
        return f"{self.location(index)} (class image {index})"

    def location(self, index: int) -> str:
        return os.path.join(self.folder, self.names[index])

    def stored_captions(self, start: int, stop: int) -> list:
        return [self.caption] * (stop - start)

    def stored_names(self, start: int, stop: int) -> list:
        return self.names[start:stop]

    def stored_sizes(self, start: int, stop: int) -> list:
        return [stat and stat.st_size for stat in map(self._stat, range(start, stop))]

    def source_digest(self) -> str:
        return content_digest(os.path.realpath(self.folder).encode(errors="surrogateescape")).hex()

    def stamps(self) -> np.ndarray:
        stats = map(self._stat, range(len(self)))
        return np.array([NOTHING if stat is None else stamp_of(stat) for stat in stats], "S16")

    def _stat(self, index: int):
        """What the system knows of a file; None if it is gone, or is a link that leads nowhere."""
        with contextlib.suppress(OSError):
            return os.stat(self.location(index))


class WithClassImages(Rows):
    """The rows of a run, then class images."""

    def __init__(self, rows: Rows, class_rows: ClassImages):
        super().__init__(rows.caption_column)
        self.parts, self.class_rows = (rows, class_rows), len(class_rows)
        self.times, self.held_out, self.background = rows.times, rows.held_out, rows.background
        self.masks, self.alpha_mask = rows.masks, rows.alpha_mask

    def __len__(self):
        return sum(map(len, self.parts))

    def _of(self, method: str, index: int):
        """The result of a part's method for row `index`."""
        rows, class_rows = self.parts
        part, index = (rows, index) if index < len(rows) else (class_rows, index - len(rows))
        return getattr(part, method)(index)

    def _of_both(self, method: str, start: int, stop: int) -> list:
        """The results of the parts' methods for rows `start` to `stop`, joined."""
        rows, class_rows = self.parts
        first = (min(start, len(rows)), min(stop, len(rows)))
        second = (max(start - len(rows), 0), max(stop - len(rows), 0))
        return [*getattr(rows, method)(*first), *getattr(class_rows, method)(*second)]

    @contextlib.contextmanager
    def _advising(self, index: int):
        """A context in which an error about a class image says what to do."""
        try:
            yield
        except BadSampleError as error:
            if index < len(self.parts[0]):
                raise
            way_out = "delete this class image, and one is generated anew, or replace it"
            raise BadSampleError(f"{error}; {way_out}") from error

    def __getitem__(self, index: int) -> dict:
        with self._advising(index):
            return super().__getitem__(index)

    def image_size(self, index: int) -> tuple:
        with self._advising(index):
            return super().image_size(index)

    def name(self, index: int) -> str:
        return self._of("name", index)

    def location(self, index: int):
        return self._of("location", index)

    def captions(self, index: int) -> list:
        return self._of("captions", index)

    def stored_captions(self, start: int, stop: int) -> list:
        return self._of_both("stored_captions", start, stop)

    def stored_names(self, start: int, stop: int) -> list:
        return self._of_both("stored_names", start, stop)

    def stored_sizes(self, start: int, stop: int) -> list:
        return self._of_both("stored_sizes", start, stop)

    def without_captions(self):
        return self.parts[0].without_captions()

    def source_digest(self) -> str:
        return content_digest("".join(part.source_digest() for part in self.parts).encode()).hex()

    def stamps(self) -> np.ndarray:
        return np.concatenate([part.stamps() for part in self.parts])

    def all_stamps(self) -> np.ndarray:
        return np.concatenate([part.all_stamps() for part in self.parts])

    def summary(self, unreadable=None) -> str:
        return f"prior preservation: {self.class_rows:,} class images"
