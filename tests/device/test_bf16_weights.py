"""Weights in bfloat16 without masters on a device that computes in it."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import pytest

from tests.conftest import scalars, weights

pytestmark = pytest.mark.once

RUNS = {
    "fused": ["--optimizer=adafactor", "--fused_backward", "--max_grad_norm=0", "--gradient_checkpointing"],
    "float32": ["--optimizer=lion", "--mixed_precision=no", "--param_rounding=kahan"],  # widened by the layers
}


def test_full_training_keeps_its_weights_in_bf16(jobs, on_device):
    flags = ["--mixed_precision=bf16", "--param_dtype=bf16", "--max_train_steps=2", "--checkpointing_steps=2"]
    outs = {case: jobs.add("sd", case, *flags, "--train_batch_size=2", *more) for case, more in RUNS.items()}
    for (case, out), report in zip(outs.items(), on_device(jobs.list)):
        assert report["status"] == 0, (case, report["error"][-3000:], report["said"][-2000:])
        saved = weights(out / "checkpoint-2")
        assert {array.dtype.name for array in saved.values()} == {"bfloat16", "float32"}
        assert all(np.isfinite(array.astype("float32")).all() for array in saved.values())
        assert len(set(scalars(out))) == 2
