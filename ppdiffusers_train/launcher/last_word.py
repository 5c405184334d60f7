"""The last line on the screen after a failure under `paddle.distributed.launch`.

When a rank has failed, the launcher prints lines of its own: the command, the end of the rank's log, an exit code. The
rank's error message is somewhere among them, and there is none of a rank that was killed. A small process that outlives
the launcher prints it again at the end. With `ppdiffusers-train launch`, that command does.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from ppdiffusers_train.launcher.watched_ranks import message_file, status_file

PARENT = os.getppid()  # also the parent of this process's stand-in (stand_in.py)
WATCHED = "PPDIFFUSERS_TRAIN_WATCHED"  # id of the process that started the launcher and watches it, if there is one
PROGRAM = Path(__file__).with_name("watched_ranks.py")


def watch_launcher() -> None:
    """Start a process, on one of the ranks, that prints the run's last message after the launcher's last line."""
    with contextlib.suppress(OSError):  # another rank was faster
        if is_launcher(PARENT) and WATCHED not in os.environ:
            _marker().touch(0o600, exist_ok=False)
            with open(f"/proc/{PARENT}/fd/2", "a") as screen:
                subprocess.Popen(
                    [sys.executable, "-I", "-S", PROGRAM, str(PARENT)],
                    stdin=subprocess.DEVNULL,
                    stdout=screen,
                    stderr=screen,
                    start_new_session=True,
                )


def print_after_launcher(message: str) -> None:
    """Make `message` the run's last message, unless another rank has failed or was killed before."""
    with contextlib.suppress(OSError):  # another rank was faster
        if is_launcher(PARENT) and _is_watched():
            file = message_file(PARENT)
            temporary = file.with_suffix(f".{os.getpid()}")  # linked when complete, so the file appears atomically
            temporary.touch(0o600, exist_ok=False)
            try:
                temporary.write_text(message)
                os.link(temporary, file)
            finally:
                temporary.unlink()


def note_status(status: int) -> None:
    """Write the run's wait status for the process that watches the launcher, if there is one."""
    with contextlib.suppress(OSError):  # the launcher has ended
        if _is_watched():
            status_file(PARENT, os.getpid()).write_text(str(status))


def _is_watched() -> bool:
    return Path("/proc", os.environ[WATCHED]).exists() if WATCHED in os.environ else _marker().exists()


def _marker() -> Path:
    """A file that exists while a process of `watch_launcher` watches."""
    return message_file(PARENT).with_suffix(".watched")


def is_launcher(process: int) -> bool:
    """Whether a process is Paddle's launcher, by its command line."""
    try:
        return b"paddle.distributed.launch" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
