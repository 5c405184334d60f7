"""The prior's script, on a machine whose second GPU breaks in the third step, with a token in the error's text."""

import ppdiffusers_train  # noqa: F401

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.conftest import KANDINSKY, load_script  # noqa: E402


def main():
    job = load_script(KANDINSKY / "train_text_to_image_prior.py")
    forward, calls = job.KandinskyPriorTrainingModule.forward, []

    def breaks(self, encoded, draws):
        calls.append(None)
        if os.environ["PADDLE_TRAINER_ID"] == "1" and len(calls) == 5:
            raise OSError(f"the GPU has fallen off the bus, says {os.environ['HF_TOKEN']}")
        return forward(self, encoded, draws)

    job.KandinskyPriorTrainingModule.forward = breaks
    job.main()


if __name__ == "__main__":
    main()
