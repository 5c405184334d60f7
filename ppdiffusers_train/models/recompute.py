"""Gradient checkpointing, which Paddle calls recompute: activations are computed again in the backward pass.

What is kept of a block is its input. ppdiffusers' own recompute leaves out much: the attention of UNets, the prior,
layers whose input needs no gradient; and it is broken for SD3 (0.29.0).
"""

from functools import partial

import paddle
from paddle.base import core
from paddle.distributed.fleet.utils import recompute

# Classes of layers that are recomputed as a whole, wherever they are not inside of another one.
BLOCKS = (
    "ResnetBlock2D", "Downsample2D", "Upsample2D", "Attention", "BasicTransformerBlock", "JointTransformerBlock",
    "CLIPEncoderLayer", "TransformerBlock",
)  # fmt: skip


def enable_recompute(model) -> None:
    """Recompute the blocks of a model: a UNet, VAE, prior, transformer or text encoder."""
    use_reentrant = not recomputes_without_reentrance()
    for block in blocks_of(model):
        block.forward = partial(recomputed, block, block.forward, use_reentrant)


def blocks_of(layer):
    """Yield the outermost sublayers of the classes in `BLOCKS`."""
    for child in layer.children():
        if type(child).__name__ in BLOCKS:
            yield child
        else:
            yield from blocks_of(child)


def recomputed(block, forward, use_reentrant: bool, *args, **options):
    """What `forward` of a block returns, computed again in the backward pass, if there will be one."""
    inputs = [value for value in (*args, *options.values()) if isinstance(value, paddle.Tensor)]
    needs_gradient = any(not tensor.stop_gradient for tensor in (*inputs, *block.parameters()))
    if not (needs_gradient and paddle.is_grad_enabled()):
        return forward(*args, **options)
    trigger = paddle.zeros([1])  # Paddle needs an input with a gradient
    trigger.stop_gradient = False
    if use_reentrant:
        return reentrant(forward, trigger, args, options)
    return recompute(untraced, trigger, forward, *args, use_reentrant=False, **options)


def untraced(trigger, forward, *args, **options):
    """`forward(*args, **options)`, not traced by `--to_static`: both times, the same tensors have to be kept."""
    translate = core.set_eval_frame(None)
    try:
        return forward(*args, **options)
    finally:
        core.set_eval_frame(translate)


def reentrant(forward, trigger, args, options: dict):
    """The same by Paddle's reentrant recompute, the only one of Paddle 2.6 on a CPU.

    It returns gradients to positional arguments only, also to those without effect, and cannot return None, as SD3's
    last block does.
    """
    names = [name for name, value in options.items() if isinstance(value, paddle.Tensor)]
    missing = []

    def call(trigger, *tensors):
        results = forward(*tensors[: len(args)], **{**options, **dict(zip(names, tensors[len(args) :]))})
        if not isinstance(results, tuple):
            return results + 0 * trigger
        missing[:] = [result is None for result in results]
        return tuple(result + 0 * trigger for result in results if result is not None)

    found = recompute(call, trigger, *args, *(options[name] for name in names), use_reentrant=True)
    if not missing:
        return found
    found = iter(found if isinstance(found, (tuple, list)) else [found])
    return tuple(None if is_none else next(found) for is_none in missing)


def recomputes_without_reentrance() -> bool:
    """Whether the installed Paddle supports non-reentrant recompute on this device."""
    number = paddle.ones([1])
    number.stop_gradient = False
    try:
        recompute(lambda x: 2 * x, number, use_reentrant=False)
    except RuntimeError:
        return False
    return True
