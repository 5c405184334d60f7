"""Gradient checkpointing as Paddle calls it: activations are computed again in the backward pass."""

import os

import paddle
from paddle.distributed.fleet.utils import recompute


def enable_recompute(model) -> None:
    """Switch a model of ppdiffusers to recompute.

    Paddle 2.6 on a CPU recomputes only in its reentrant way (else: "Recompute with RNG perserve is not support current
    device: cpu"), which ppdiffusers takes when this environment variable says so.
    """
    model.enable_gradient_checkpointing()
    if not recomputes_without_reentrance():
        os.environ.setdefault("FLAG_RECOMPUTE_USE_REENTRANT", "True")


def recomputes_without_reentrance() -> bool:
    """Whether the installed Paddle can do on this device what ppdiffusers asks of it by default."""
    number = paddle.ones([1])
    number.stop_gradient = False
    try:
        recompute(lambda x: 2 * x, number, use_reentrant=False)
    except RuntimeError:
        return False
    return True
