"""Gradient checkpointing, which Paddle calls recompute: activations are computed again in the backward pass."""

import os
from functools import partial

import paddle
from paddle.distributed.fleet.utils import recompute


def enable_recompute(model) -> None:
    """Switch a model of ppdiffusers to recompute.

    Paddle 2.6 on a CPU supports only reentrant recompute (else: "Recompute with RNG perserve is not support current
    device: cpu"). ppdiffusers uses it when the environment variable FLAG_RECOMPUTE_USE_REENTRANT is set.
    """
    model.enable_gradient_checkpointing()
    if not recomputes_without_reentrance():
        os.environ.setdefault("FLAG_RECOMPUTE_USE_REENTRANT", "True")


def enable_block_recompute(blocks) -> None:
    """Recompute each of a transformer's blocks, for models whose gradient checkpointing ppdiffusers lacks or breaks.

    The prior has none. SD3's (0.29.0) treats a block's two results as one, and fails at the second block. A block is
    called as `block(hidden_states, …)`. Where its input needs no gradient, recompute would save nothing.
    """
    use_reentrant = not recomputes_without_reentrance()

    def recomputed(forward, hidden_states, **options):
        if hidden_states.stop_gradient or not paddle.is_grad_enabled():
            return forward(hidden_states, **options)
        # Reentrant recompute returns gradients to positional arguments only, and cannot return None, as SD3's last
        # block does.
        tensors = {name: value for name, value in options.items() if isinstance(value, paddle.Tensor)}
        missing = []

        def call(states, *values):
            results = forward(states, **{**options, **dict(zip(tensors, values))})
            if not isinstance(results, tuple):
                return results
            missing[:] = [result is None for result in results]
            return tuple(result for result in results if result is not None)

        found = recompute(call, hidden_states, *tensors.values(), use_reentrant=use_reentrant)
        if not missing:
            return found
        found = iter(found if isinstance(found, (tuple, list)) else [found])
        return tuple(None if is_none else next(found) for is_none in missing)

    for block in blocks:
        block.forward = partial(recomputed, block.forward)


def recomputes_without_reentrance() -> bool:
    """Whether the installed Paddle supports non-reentrant recompute on this device, as ppdiffusers expects."""
    number = paddle.ones([1])
    number.stop_gradient = False
    try:
        recompute(lambda x: 2 * x, number, use_reentrant=False)
    except RuntimeError:
        return False
    return True
