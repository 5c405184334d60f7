"""The last message on the screen after a failure under `paddle.distributed.launch`.

When a rank has failed, the launcher prints lines of its own: the command, the end of the rank's log, an exit code. The
rank's error message is somewhere among them, and there is none of a rank that was killed. A small process that outlives
the launcher prints it again at the end. With `ppdiffusers-train launch`, that command does.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from ppdiffusers_train.launcher.watched_ranks import MESSAGE_BYTES, address_of, open_mailbox

PARENT = os.getppid()  # also the parent of this process's supervisor (supervisor.py)
PROGRAM = Path(__file__).with_name("watched_ranks.py")
SEND_SECONDS = 5.0  # a process that watches reads at once, unless it was stopped


def is_launcher(process: int) -> bool:
    """Whether a process is Paddle's launcher, by its command line."""
    try:
        return b"paddle.distributed.launch" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


ADDRESS = address_of(PARENT) if is_launcher(PARENT) else None  # of what watches the launcher; cannot be known later


def watch_launcher() -> None:
    """Start a process, on one of the ranks, that prints the run's last message after the launcher's last line."""
    if ADDRESS is None:
        return
    with contextlib.suppress(OSError), open_mailbox(ADDRESS) as mailbox:  # or another process watches already
        # Without waiting for a reader, if the screen is a pipe.
        screen = os.open(f"/proc/{PARENT}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            subprocess.Popen(
                [sys.executable, "-I", "-S", PROGRAM, str(PARENT), str(mailbox.fileno())],
                pass_fds=[mailbox.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=screen,
                start_new_session=True,
            )
        finally:
            os.close(screen)


def print_after_launcher(message: str) -> None:
    """Make `message` the run's last message, unless another rank has failed or was killed before.

    To be called before the rank prints it: `ppdiffusers-train launch` does not show twice what it knows.
    """
    _send(message=message[: MESSAGE_BYTES // 8])  # characters, of up to six bytes in JSON


def send_status(status: int) -> None:
    """Send the run's wait status to the process that watches the launcher, if there is one."""
    _send(status=status)


def _send(**what) -> None:
    if ADDRESS is not None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:  # nobody watches
            sender.settimeout(SEND_SECONDS)
            sender.sendto(json.dumps(what).encode(), ADDRESS)
