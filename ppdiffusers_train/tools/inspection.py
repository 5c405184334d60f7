"""Images decoded in full by several processes. These import little beside Pillow: they start fast and are small."""

import itertools
import multiprocessing
import signal
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from ppdiffusers_train.data.inspection import Inspected, inspect
from ppdiffusers_train.errors import RunError

CHUNK = 16  # images per task of a process
CHUNKS_AHEAD = 4  # tasks per process in advance


def inspect_all(items, processes: int):
    """Yield `(key, Inspected)` of each `(key, location)`, in order.

    Args:
        items: an iterable; it is consumed only as fast as the processes work. An image that is known already has its
            `Inspected` in place of the location.
        processes: number of processes; with 1, this process does the work.
    Raises:
        RunError: a process was killed.
    """
    if processes == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for key, location in items:
                yield key, location if isinstance(location, Inspected) else inspect(location)
        return
    pending = deque()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_process)
    try:
        for chunk in _chunks(items):
            unknown = [location for _, location in chunk if not isinstance(location, Inspected)]
            pending.append((chunk, pool.submit(_inspect_chunk, unknown) if unknown else None))
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


def _finished(chunk, future):
    seen = iter(future.result() if future else ())
    return ((key, location if isinstance(location, Inspected) else next(seen)) for key, location in chunk)


def _inspect_chunk(locations) -> list:
    return [inspect(location) for location in locations]


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent process
    warnings.simplefilter("ignore")  # Pillow's, about files that it can read nevertheless
