"""The last line on the screen after a failure under `paddle.distributed.launch`.

The launcher ends a run in which a rank failed with lines of its own: the command, the end of the rank's log, a number.
What the rank had to say is somewhere among them, and of one that was killed there is nothing. A small process that
outlives the launcher says it once more. Under `ppdiffusers-train launch` that command does.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from ppdiffusers_train.launcher.watched_ranks import message_file, status_file

PARENT = os.getppid()  # also of the process that stands in for this one (stand_in.py)
WATCHED = "PPDIFFUSERS_TRAIN_WATCHED"  # the process that started the launcher and watches it, where one does
PROGRAM = Path(__file__).with_name("watched_ranks.py")


def watch_launcher() -> None:
    """Have the run's last word said where the launcher prints, after its last line; one of its ranks sees to that."""
    with contextlib.suppress(OSError):  # another rank was first
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
    """Make `message` the run's last word, unless another rank has said one or was killed before."""
    with contextlib.suppress(OSError):  # another rank was first
        if is_launcher(PARENT) and _is_watched():
            file = message_file(PARENT)
            whole = file.with_suffix(f".{os.getpid()}")  # first: the file is there with all of it, or not at all
            whole.touch(0o600, exist_ok=False)
            try:
                whole.write_text(message)
                os.link(whole, file)
            finally:
                whole.unlink()


def note_status(status: int) -> None:
    """Before this process ends: leave its run's wait status to who watches the launcher, if anybody does."""
    with contextlib.suppress(OSError):  # the launcher has ended
        if _is_watched():
            status_file(PARENT, os.getpid()).write_text(str(status))


def _is_watched() -> bool:
    return Path("/proc", os.environ[WATCHED]).exists() if WATCHED in os.environ else _marker().exists()


def _marker() -> Path:
    """Is there while a process of `watch_launcher` watches."""
    return message_file(PARENT).with_suffix(".watched")


def is_launcher(process: int) -> bool:
    """Whether a process is Paddle's launcher, as far as the system tells."""
    try:
        return b"paddle.distributed.launch" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
