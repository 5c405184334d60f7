"""One run at a time in a folder.

A run that is stopped may still be writing its checkpoint when its launcher has already ended. The next run in the
folder waits for it: otherwise it would resume from an older checkpoint, and delete the unfinished one as stale.
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path

NAME = ".lock"
POLL_SECONDS = 0.2
QUIET_SECONDS = 1.0  # a lock that another rank holds while it looks at the folder is shorter


@contextlib.contextmanager
def folder_held(folder: Path, log=print):
    """Lock a folder until the end of the context or of the process; waits for a run that has locked it."""
    path = folder / NAME
    with lock(path, fcntl.LOCK_EX, log):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def wait_for_folder(folder: Path, log=print) -> None:
    """Wait until no run has locked a folder."""
    with contextlib.suppress(FileNotFoundError), lock(folder / NAME, fcntl.LOCK_SH, log, mode="r"):
        pass


def lock(path: Path, kind: int, log, mode: str = "a+"):
    """Open and lock a file, after waiting for its lock; on a file system without locks, only open it."""
    start, is_logged = time.monotonic(), False
    while True:
        file = open(path, mode)
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            # The previous holder may have removed the file meanwhile.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            if not is_logged and time.monotonic() - start > QUIET_SECONDS:
                is_logged = True
                log(f"{str(path.parent)!r}: another run still writes there; waiting for its end")
            time.sleep(POLL_SECONDS)
        except OSError:
            return file
        file.close()
