"""The prior's script on a slow machine: a batch and a file's way to the disk take as many seconds more as the variables
`SECONDS_PER_BATCH` and `SECONDS_PER_FILE` say."""

import ppdiffusers_train  # noqa: F401

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.conftest import KANDINSKY, load_script  # noqa: E402


def slowly(function, variable):
    """The function, after so many seconds."""

    def slow(*args):
        time.sleep(float(os.environ.get(variable, 0)))
        return function(*args)

    return slow


def slow_job():
    """The prior's script as a module, on a slow machine."""
    job = load_script(KANDINSKY / "train_text_to_image_prior.py")
    trains = job.KandinskyPriorTrainingModule
    trains.forward = slowly(trains.forward, "SECONDS_PER_BATCH")
    os.fsync = slowly(os.fsync, "SECONDS_PER_FILE")
    return job


if __name__ == "__main__":
    slow_job().main()
