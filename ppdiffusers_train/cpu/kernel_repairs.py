"""Repairs of Paddle's CPU kernels whose gradients are wrong, in Paddle 2.6.2 and 3.3.1.

They are made where the kernels are called, in `paddle._C_ops`, which every layer and function goes through, traced
graphs included. Whether one is needed is tried out on the device that computes: a GPU has kernels of its own.
"""

import paddle
from paddle import _C_ops

# Below -84.28, x · exp(-x) is beyond float32 in Paddle's formula. From here on silu and its gradient are below 1e-32.
LOWEST = -80.0


def repair_kernels() -> None:
    """Mend each gradient of `REPAIRS` that is wrong on the present device; once is enough, and more change nothing."""
    for name, (is_broken, repaired) in REPAIRS.items():
        if is_broken():
            setattr(_C_ops, name, repaired(getattr(_C_ops, name)))


def silu_gradient_is_broken() -> bool:
    """Whether the gradient of silu, which is 0 at -100, comes out as NaN there."""
    number = paddle.full([1], -100.0)
    number.stop_gradient = False
    try:
        paddle.nn.functional.silu(number).backward()
    except RuntimeError:  # FLAGS_check_nan_inf, which a user may have set to find another NaN
        return True
    return bool(paddle.isnan(number.grad))


def repaired_silu(original):
    """Silu that is constant below `LOWEST`: nothing changes but the NaN, which ends runs."""
    return lambda x, *options: original(paddle.clip(x, min=LOWEST), *options)


def layer_norm_gradient_is_broken() -> bool:
    """Whether a frozen weight of zeros, through which no gradient passes, lets one pass."""
    x = paddle.to_tensor([[0.0, 0.0, 1.0]], stop_gradient=False)
    y = paddle.nn.functional.layer_norm(x, 3, paddle.zeros([3]))
    (y * paddle.to_tensor([1.0, 0.0, 0.0])).sum().backward()
    return bool(x.grad.abs().sum() > 0)


def repaired_layer_norm(original):
    """Layer norm that asks for the weight's gradient wherever it asks for that of `x`.

    The kernel leaves a weight that wants no gradient out of that of `x`. Now it wants one: the same bits forward, and
    backward those of a weight that learns. `paddle.grad` does not ask for it even so: use `backward`.
    """

    def layer_norm(x, weight, *options):
        if weight is not None and weight.stop_gradient and not x.stop_gradient:
            weight = wanting_gradient(weight)
        return original(x, weight, *options)

    return layer_norm


def group_norm_gradient_is_broken() -> bool:
    """Whether the sum of a normalized group, which is 0 whatever is in it, has a gradient without a weight."""
    x = paddle.to_tensor([[[0.0, 0.0, 1.0]]], stop_gradient=False)
    _C_ops.group_norm(x, None, None, 1e-5, 1, "NCHW").sum().backward()
    return bool(x.grad.abs().max() > 1e-3)


def repaired_group_norm(original):
    """Group norm with a weight of ones where it has none: the gradient without a weight lacks a part.

    Paddle 2.6's kernel also fails where the weight or the bias wants its gradient and `x` does not; so `x` always does.
    """

    def group_norm(x, weight, bias, epsilon, groups, data_format):
        if weight is None:
            weight = paddle.ones([x.shape[1 if data_format.startswith("NC") else -1]], x.dtype)
        if x.stop_gradient and not all(tensor is None or tensor.stop_gradient for tensor in (weight, bias)):
            x = wanting_gradient(x)
        return original(x, weight, bias, epsilon, groups, data_format)

    return group_norm


def wanting_gradient(tensor):
    """Another tensor of the same numbers, which takes a gradient that nobody wants."""
    twin = tensor.detach()
    twin.stop_gradient = False
    return twin


# {kernel: (whether it is broken, what makes its replacement)}
REPAIRS = {
    "silu": (silu_gradient_is_broken, repaired_silu),
    "layer_norm": (layer_norm_gradient_is_broken, repaired_layer_norm),
    "group_norm": (group_norm_gradient_is_broken, repaired_group_norm),
}
