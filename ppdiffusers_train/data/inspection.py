"""Looks at a stored image: whether it can be read, its size, format, content hash. Imports little beside Pillow."""

import os
import time
from dataclasses import dataclass

from PIL import Image

from ppdiffusers_train.data.pixels import open_image, read, upright_size
from ppdiffusers_train.data.rows import content_digest, read_stamped

NOTHING = bytes(16)
TICK_SECONDS = 0.1  # two changes of a file within this time may leave it with the same times


@dataclass
class Inspected:
    """An image's properties, or why it cannot be used."""

    stamp: bytes = NOTHING  # of its file (`rows.stamp_of`) when it was read; zeros if that cannot be relied on
    problem: str = ""
    is_bomb: bool = False  # whether it has so many pixels that Pillow refuses it as a decompression bomb
    is_decoded: bool = False  # whether all of it was decoded, not only the header
    width: int = 0  # upright, as training sees it
    height: int = 0
    format: str = ""  # Pillow's name of it, such as JPEG
    digest: bytes = NOTHING  # of its bytes
    remarks: str = ""  # lines "kind: text" (see `pixels.read`) about what training changes of its pixels, once decoded

    def remarks_by_kind(self) -> dict:
        """{kind: text}."""
        return dict(line.split(": ", 1) for line in self.remarks.splitlines())


def inspect(location, decode: bool = True) -> Inspected:
    """Look at the image at a `Rows.location`.

    Args:
        decode: whether to decode all of it, as training does, or only the header.
    """
    stamp, digest = NOTHING, NOTHING
    try:
        content, stamp, changed = read_stamped(location)
        if not stamp or time.time() - changed < TICK_SECONDS:
            stamp = NOTHING
        digest = content_digest(content)
        with open_image(content) as file:
            if not decode:
                return Inspected(stamp, "", False, False, *upright_size(file), file.format, digest)
            image, remarks = read(content)
            remarks = "\n".join(f"{kind}: {text}" for kind, text in remarks.items())
            return Inspected(stamp, "", False, True, *image.size, file.format, digest, remarks)
    except Exception as error:  # as in `rows.reading`
        is_bomb = isinstance(error, Image.DecompressionBombError)
        return Inspected(stamp, str(error) or type(error).__name__, is_bomb, decode, digest=digest)


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
