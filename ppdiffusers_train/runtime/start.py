"""Noticing, while the ranks of a run meet, that one has ended: Paddle waits for it for a quarter of an hour."""

import contextlib
import os
import sys
import threading

from ppdiffusers_train.launcher.final_message import PARENT, print_after_launcher
from ppdiffusers_train.launcher.watched_ranks import ended_ranks

LOOK_SECONDS = 1.0


@contextlib.contextmanager
def all_ranks_needed():
    """A context in which this process ends with one line when another rank of its launcher has ended, for whatever
    reason and with whatever status: the launcher ends the others only if the status is not 0."""
    done = threading.Event()
    threading.Thread(target=_watch, args=(done,), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(done: threading.Event) -> None:
    while not done.wait(LOOK_SECONDS):
        ended = []
        with contextlib.suppress(OSError):  # no launcher
            ended = ended_ranks(PARENT)
        if ended and not done.wait(LOOK_SECONDS):  # or all have met, and then the other one has ended
            rank = os.environ.get("PADDLE_TRAINER_ID")
            message = f"rank {rank}: rank {ended[0]} has ended before all ranks had met"
            print_after_launcher(message)
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
