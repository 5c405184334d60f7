"""The prior's script, where rank 1 cannot write its share of a sharded optimizer's state: its files stay small."""

import ppdiffusers_train  # noqa: F401

import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.conftest import KANDINSKY, load_script  # noqa: E402

if __name__ == "__main__":
    if os.environ["PADDLE_TRAINER_ID"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    load_script(KANDINSKY / "train_text_to_image_prior.py").main()
