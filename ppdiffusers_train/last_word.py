"""The last line on the screen after a failure under `paddle.distributed.launch`.

The launcher ends a run in which a rank failed with lines of its own: the command, the end of the rank's log, a number.
What the rank had to say is somewhere among them. A small process that outlives the launcher says it once more.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PARENT = os.getppid()  # also of the process that stands in for this one (stand_in.py)

# Waits until a process has ended (also where nobody has asked for its status yet), then says something.
WAIT_AND_SAY = """
import os, select, sys
launcher, marker = sys.argv[1:]
message = sys.stdin.read()
try:
    select.select([os.pidfd_open(int(launcher))], [], [])
except ProcessLookupError:
    pass
os.unlink(marker)
print(message, flush=True)
"""


def say_after_launcher(message: str) -> None:
    """Print `message` where the launcher prints, after its last line; only the first rank that fails is heard.

    Does nothing where Paddle's launcher is not this process's parent.
    """
    # Linux tells all that is needed; where it does not, the message is in the rank's log alone.
    with contextlib.suppress(OSError):
        if not is_launcher(PARENT):
            return
        marker = Path(tempfile.gettempdir()) / f"ppdiffusers_train-{PARENT}"
        marker.touch(exist_ok=False)
        with open(f"/proc/{PARENT}/fd/2", "a") as screen:
            speaker = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", WAIT_AND_SAY, str(PARENT), str(marker)],
                stdin=subprocess.PIPE,
                stdout=screen,
                stderr=screen,
                start_new_session=True,
            )
            # Not as an argument: everybody on a machine can read those.
            speaker.stdin.write(message.encode())
            speaker.stdin.close()


def is_launcher(process: int) -> bool:
    """Whether a process is Paddle's launcher, as far as the system tells."""
    try:
        return b"paddle.distributed.launch" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
