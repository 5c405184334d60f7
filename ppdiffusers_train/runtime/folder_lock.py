"""One run at a time in a folder.

A run that was told to stop may still write its checkpoint when its launcher, and whoever waited for that, has gone. The
next run in the folder waits for it: it would resume from an older checkpoint, and take what is half written for stale.
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path

NAME = ".lock"
POLL_SECONDS = 0.2
QUIET_SECONDS = 1.0  # ranks that look at a folder at the same moment are no run


@contextlib.contextmanager
def folder_held(folder: Path, say=print):
    """Hold a folder until the end of the context or of the process; waits for a run that holds it."""
    path = folder / NAME
    with lock(path, fcntl.LOCK_EX, say):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def wait_for_folder(folder: Path, say=print) -> None:
    """Return when no run holds a folder."""
    with contextlib.suppress(FileNotFoundError), lock(folder / NAME, fcntl.LOCK_SH, say, mode="r"):
        pass


def lock(path: Path, kind: int, say, mode: str = "a+"):
    """The open and locked file, once it can be had. Where a file system knows no locks, nobody waits."""
    start, told = time.monotonic(), False
    while True:
        file = open(path, mode)
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            # Whoever held it may have removed it meanwhile.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            if not told and time.monotonic() - start > QUIET_SECONDS:
                told = True
                say(f"{str(path.parent)!r}: another run still writes there; waiting for its end")
            time.sleep(POLL_SECONDS)
        except OSError:
            return file
        file.close()
