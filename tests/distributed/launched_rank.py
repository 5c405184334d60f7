"""A rank of two that needs no Paddle, and says whether it has its token.

launched_rank.py fails|killed|waits|leaves
"""

import ppdiffusers_train  # noqa: F401

import os
import signal
import sys
import time

from ppdiffusers_train.errors import RunError, UserError, one_line_errors
from ppdiffusers_train.runtime.start import all_ranks_needed

RANK = int(os.environ["PADDLE_TRAINER_ID"])


def receive(number, frame):
    print(f"rank {RANK} got {signal.Signals(number).name}", flush=True)
    if number != signal.SIGUSR1:
        raise SystemExit(128 + number)


@one_line_errors
def main(argv=None):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, receive)
    print(f"rank {RANK} has a token of {len(os.environ['SOME_TOKEN'])} characters", flush=True)
    time.sleep(1)
    if sys.argv[1] == "waits":
        while True:
            time.sleep(1)
    if sys.argv[1] == "leaves":
        with all_ranks_needed():  # as around Paddle's own waiting, which nothing interrupts
            time.sleep(1000 * (1 - RANK))
        return
    if RANK == 1:
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("--flag: of rank 1 is wrong")
    time.sleep(0.2)
    raise RunError("another rank has ended")


if __name__ == "__main__":
    main()
