"""One run at a time in a folder.

A run that is stopped may still be writing its checkpoint when its launcher has already ended. A run that
resumes waits for it: otherwise it would resume from an older checkpoint, and delete the unfinished one as stale. A
fresh run is refused: it would replace the other one's result.
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from ppdiffusers_train.errors import UserError, writing

NAME = ".lock"
POLL_SECONDS = 0.2
QUIET_SECONDS = 1.0  # a lock that another rank holds while it looks at the folder is shorter


@contextlib.contextmanager
def folder_held(folder: Path, resumes: bool, log=print):
    """Lock a folder until the end of the context or of the process, after waiting for a run that has locked it.

    Raises:
        UserError: a run has locked it, and this one does not resume.
    """
    path = folder / NAME
    with writing("--output_dir: the run's lock", folder):
        held = lock(path, fcntl.LOCK_EX, resumes, log)
    with held:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # whoever finds it, can lock it
                path.unlink(missing_ok=True)


def wait_for_folder(folder: Path, resumes: bool, log=print) -> None:
    """Wait until no run has locked a folder. Raises a `UserError` as `folder_held` does."""
    with contextlib.suppress(FileNotFoundError), lock(folder / NAME, fcntl.LOCK_SH, resumes, log, mode="r"):
        pass


def lock(path: Path, kind: int, resumes: bool, log, mode: str = "a+"):
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
                found = f"{str(path.parent)!r}: another run still writes there"
                if not resumes:
                    raise UserError(
                        f"--output_dir: {found}; expected another folder, or --resume_from_checkpoint latest, which "
                        "waits for its end"
                    ) from None
                is_logged = True
                log(f"{found}; waiting for its end")
            time.sleep(POLL_SECONDS)
        except OSError:
            return file
        file.close()
