"""One of two ranks, of which one takes long or hangs: `waiting_worker.py scenario timeout folder`."""

import ppdiffusers_train  # noqa: F401

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ppdiffusers_train.errors import one_line_errors  # noqa: E402
from ppdiffusers_train.runtime.distributed import start_ranks  # noqa: E402

LONGER = 3  # than the timeout is what a rank works


def compute(seconds):
    """Spend a twelfth of the time on a processor, as one of many that share it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.process_time()
        while time.process_time() - began < 0.05:
            pass
        time.sleep(0.55)


def write(seconds, file):
    """Write as to a slow disk, with next to no work for a processor."""
    end = time.monotonic() + seconds
    with open(file, "wb", buffering=0) as opened:
        while time.monotonic() < end:
            opened.write(bytes(16384))
            time.sleep(0.6)


def hang():
    time.sleep(1000)


def work_long(ranks, folder):
    """Every way to wait, each for a rank that works longer than the timeout."""
    seconds = LONGER * ranks.timeout
    if ranks.rank == 1:
        write(seconds, folder / "slow disk")
    assert ranks.gather(ranks.rank) == [0, 1]
    with ranks.main_first("a slow rank 0") as is_turn:
        if is_turn:
            compute(seconds)
    ranks.step = 6
    if ranks.rank == 1:
        compute(seconds)
    assert ranks.total(ones=1, ranks=ranks.rank) == [2, 1]
    ranks.gather(None)


def hang_on_one(ranks, folder):
    if ranks.rank == 1:
        hang()
    ranks.gather(None, "a share of something")


def hang_on_zero(ranks, folder):
    with ranks.main_first("a checkpoint") as is_turn:
        if is_turn:
            hang()


def stop_zero(ranks, folder):
    """Stopped from outside, with the store that it keeps."""
    if ranks.is_main:
        os.kill(os.getpid(), signal.SIGSTOP)
    with ranks.main_first("a checkpoint"):
        pass


def kill_zero(ranks, folder):
    with ranks.main_first("a checkpoint") as is_turn:
        if is_turn:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)


def fail_on_zero(ranks, folder):
    with ranks.main_first("a checkpoint") as is_turn:
        if is_turn:
            raise OSError("no disk")


@one_line_errors
def main(argv=None):
    name, timeout, folder = sys.argv[1:]
    ranks = start_ranks(1, float(timeout))
    print("started", flush=True)
    began = time.monotonic()
    try:
        globals()[name](ranks, Path(folder))
    finally:
        print(f"after {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
