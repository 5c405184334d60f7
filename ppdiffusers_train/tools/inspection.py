"""Images decoded in full by several processes: whether training can use them, their sizes and formats.

The processes import this file and no library beside Pillow, so that they start fast and are small.
"""

import itertools
import multiprocessing
import os
import signal
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from PIL import Image

from ppdiffusers_train.data.rows import content_digest, open_image, read_stored, upright_size
from ppdiffusers_train.errors import RunError

CHUNK = 16  # images per task of a process
CHUNKS_AHEAD = 4  # tasks per process in advance


@dataclass
class Inspected:
    """An image's properties, or why it cannot be used."""

    problem: str = ""
    is_bomb: bool = False  # whether it has so many pixels that Pillow refuses it as a decompression bomb
    width: int = 0  # upright, as training sees it
    height: int = 0
    format: str = ""  # Pillow's name of it, such as JPEG
    digest: bytes = b""  # of its bytes


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def inspect(location) -> Inspected:
    """Decode the image at a `Rows.location` as training does."""
    try:
        content = read_stored(location)
        with open_image(content) as file:
            size = upright_size(file)
            file.load()
            if file.mode != "RGB":
                file.convert("RGB")  # fails for some modes
            return Inspected("", False, *size, file.format, content_digest(content))
    except Exception as error:  # as in `rows.reading`
        return Inspected(str(error) or type(error).__name__, isinstance(error, Image.DecompressionBombError))


def inspect_all(items, processes: int):
    """Yield `(key, Inspected)` of each `(key, location)`, in order.

    Args:
        items: an iterable; it is consumed only as fast as the processes work.
        processes: number of processes; with 1, this process does the work.
    Raises:
        RunError: a process was killed.
    """
    if processes == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for key, location in items:
                yield key, inspect(location)
        return
    pending = deque()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_process)
    try:
        for chunk in _chunks(items):
            keys, locations = zip(*chunk)
            pending.append((keys, pool.submit(_inspect_chunk, locations)))
            if len(pending) >= processes * CHUNKS_AHEAD:
                yield from _finished(*pending.popleft())
        while pending:
            yield from _finished(*pending.popleft())
    except BrokenProcessPool as error:
        raise RunError(
            f"one of {processes} processes that decode images was killed, most likely out of memory; try fewer "
            "--processes"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _chunks(items):
    items = iter(items)
    while chunk := list(itertools.islice(items, CHUNK)):
        yield chunk


def _finished(keys, future):
    return zip(keys, future.result())


def _inspect_chunk(locations) -> list:
    return [inspect(location) for location in locations]


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent process
    warnings.simplefilter("ignore")  # Pillow's, about files that it can read nevertheless
