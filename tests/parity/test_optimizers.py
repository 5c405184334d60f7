"""Each optimizer against its reference package, over 50 steps with the same gradients.

adamw: torch; adafactor: transformers; lion: lion-pytorch; prodigy: prodigyopt; schedulefree: schedulefree.
"""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest
import torch
from lion_pytorch import Lion
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from transformers import Adafactor

from ppdiffusers_train.runtime.bf16_weights import Rounding
from ppdiffusers_train.runtime.optimizers.registry import build_optimizer

STEPS, SHAPES = 50, ([40, 30], [7])
DECAY = {"weight_decay": 0.1}
ADAFACTOR = {"relative_step": False, "scale_parameter": False}
CASES = {
    "adamw": (1e-2, DECAY, lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1)),
    "adafactor": (1e-2, {}, lambda p: Adafactor(p, 1e-2, **ADAFACTOR)),
    "adafactor with all": (
        1e-2, {"beta1": 0.9, "scale_parameter": True, "clip_threshold": 0.5, "decay_rate": 0.7, **DECAY},
        lambda p: Adafactor(
            p, 1e-2, beta1=0.9, clip_threshold=0.5, decay_rate=-0.7, relative_step=False, scale_parameter=True, **DECAY
        ),
    ),
    "lion": (1e-3, {"beta2": 0.95, **DECAY}, lambda p: Lion(p, 1e-3, betas=(0.9, 0.95), **DECAY)),
    "prodigy": (1.0, {"d_coef": 0.5}, lambda p: Prodigy(p, d_coef=0.5)),
    "prodigy with all": (
        1.0, {"d0": 1e-4, "d_coef": 2.0, "growth_rate": 1.3, "safeguard_warmup": True, "use_bias_correction": True,
              "weight_decay": 0.01, "beta3": 0.99},
        lambda p: Prodigy(p, d0=1e-4, d_coef=2.0, growth_rate=1.3, safeguard_warmup=True, use_bias_correction=True,
                          weight_decay=0.01, beta3=0.99),
    ),
    "schedulefree": (1e-2, DECAY, lambda p: AdamWScheduleFree(p, 1e-2, foreach=False, **DECAY)),
    "schedulefree with all": (
        1e-2, {"r": 0.5, "weight_lr_power": 1.0, "beta1": 0.95},
        lambda p: AdamWScheduleFree(p, 1e-2, foreach=False, r=0.5, weight_lr_power=1.0, betas=(0.95, 0.999)),
    ),
}  # fmt: skip


def gradients(values, tensor_of):
    """Of a quadratic function with noise, at `values`, in one of the libraries."""
    random = np.random.default_rng(0)
    curves, targets = ([np.float32(random.uniform(0.5, 1.5, shape)) for shape in SHAPES] for _ in range(2))
    for _ in range(STEPS):
        noise = [np.float32(0.1 * random.standard_normal(shape)) for shape in SHAPES]
        yield [
            tensor_of(curve) * (value.detach() - tensor_of(target)) + tensor_of(bump)
            for value, curve, target, bump in zip(values, curves, targets, noise)
        ]


def starts(name):
    """Prodigy's first steps are smaller than float32's rounding of numbers near 1, so it starts at 0."""
    random = np.random.default_rng(1)
    return [np.float32(random.standard_normal(shape) * (not name.startswith("prodigy"))) for shape in SHAPES]


def run_paddle(name, rate, options):
    values = [paddle.create_parameter(shape, "float32") for shape in SHAPES]
    for value, start in zip(values, starts(name)):
        value.set_value(start)
    rounding = Rounding("kahan", 0, {}) if name == "adamw" else None  # our own formulas, as of bf16 weights
    optimizer = build_optimizer(name.split()[0], rate, values, options, rounding)
    for found in gradients(values, paddle.to_tensor):
        for value, gradient in zip(values, found):
            value.grad = gradient
        optimizer.step()
        optimizer.clear_grad()
    return values, optimizer


@pytest.mark.parametrize("name", CASES)
def test_it_takes_the_steps_of_its_reference(name):
    rate, options, build = CASES[name]
    values, optimizer = run_paddle(name, rate, options)
    others = [torch.nn.Parameter(torch.tensor(start)) for start in starts(name)]
    reference = build(others)
    if hasattr(reference, "train"):
        reference.train()
    for found in gradients(others, torch.tensor):
        for other, gradient in zip(others, found):
            other.grad = gradient
        reference.step()
    assert_same(values, others, name)
    assert max(np.abs(value.numpy() - start).max() for value, start in zip(values, starts(name))) > 0.01
    if optimizer.averages:
        reference.eval()
        assert_same(map(optimizer.evaluation_value, values), others, name)


def assert_same(values, others, name):
    for value, other in zip(values, others):
        off = np.abs(value.numpy() - other.detach().numpy()).max() / max(1.0, np.abs(value.numpy()).max())
        assert off < 1e-5, (name, off)
