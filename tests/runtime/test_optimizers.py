"""The optimizers of `--optimizer`: in runs, their options, and their sizes."""

import ppdiffusers_train  # noqa: F401

import shutil

import numpy as np
import paddle
import pytest

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.loop.dry_run import inventory_of, options_of
from ppdiffusers_train.loop.memory_estimate import Peaks
from ppdiffusers_train.runtime.bf16_weights import Rounding
from ppdiffusers_train.runtime.checkpoint import read_state
from ppdiffusers_train.runtime.optimizers.registry import OPTIMIZERS, build_optimizer, read_options
from ppdiffusers_train.runtime.precision import share_storage
from tests.conftest import last_error, optimizer_state, same, scalars, tensors, weights

RULES = ["adafactor", "lion", "prodigy", "schedulefree"]
FUSED = ["--fused_backward", "--max_grad_norm=0"]
BF16 = ["--param_dtype=bf16"]
RUNS = {
    "adafactor": ["--optimizer=adafactor", *FUSED, "--gradient_checkpointing"],
    "lion": ["--optimizer=lion", "--learning_rate=1e-5", "--max_grad_norm_per_parameter=0.1", "--max_grad_norm=0"],
    "prodigy": ["--optimizer=prodigy", "--optimizer_args", "d_coef=2", "safeguard_warmup=true", "--use_ema"],
    "schedulefree": ["--optimizer=schedulefree", "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=3"],
    "stochastic": ["--optimizer=adafactor", *FUSED, *BF16],
    "kahan": [*BF16, "--param_rounding=kahan", "--optimizer=adamw8bit"],
    "bf16 adamw": [*BF16, *FUSED],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_has_the_same_bits(train, name):
    flags = [*RUNS[name], "--max_train_steps=4", "--checkpointing_steps=2"]
    whole = train("prior", *flags, out="whole")
    shutil.copytree(whole, whole.parent / "parts")
    shutil.rmtree(whole.parent / "parts" / "checkpoint-4")
    parts = train("prior", *flags, "--resume_from_checkpoint=latest", out="parts")
    assert same(weights(whole, "prior"), weights(parts, "prior"))
    ends = whole / "checkpoint-4", parts / "checkpoint-4"
    assert same(*map(optimizer_state, ends)) and same(*(weights(end, "prior") for end in ends))
    assert read_state(ends[0])["optimizer"] == read_state(ends[1])["optimizer"]
    assert len(set(scalars(whole))) == 4
