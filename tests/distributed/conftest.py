"""Flags that the runs of two processes have in common."""

import ppdiffusers_train  # noqa: F401

import pytest

from tests.distributed.launching import COMMON


@pytest.fixture(scope="session")
def base_flags(kandinsky, photos):
    prior, decoder = kandinsky
    return [
        f"--pretrained_decoder_model_name_or_path={decoder}",
        f"--pretrained_prior_model_name_or_path={prior}",
        f"--train_data_dir={photos}",
        *["--resolution=64", "--seed=0", *COMMON],
    ]
