"""The prior's script, where a gradient is not a number in rank 1's third batch."""

import ppdiffusers_train  # noqa: F401

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.conftest import KANDINSKY, load_script  # noqa: E402


def main(argv=None):
    job = load_script(KANDINSKY / "train_text_to_image_prior.py")
    forward, calls = job.KandinskyPriorTrainingModule.forward, []

    def broken(self, encoded, draws):
        calls.append(None)
        loss = forward(self, encoded, draws)
        if os.environ["PADDLE_TRAINER_ID"] == "1" and len(calls) == 3:
            return loss + (0 * self.prior.proj_in.bias).sqrt().sum()  # 0, and its gradient is not a number
        return loss

    job.KandinskyPriorTrainingModule.forward = broken
    job.main(argv)
