"""Repairs of Paddle's CPU kernels whose gradients are wrong, in Paddle 2.6.2 and 3.3.1.

They replace functions of `paddle._C_ops`, through which every layer and function calls the kernels, in traced graphs,
too. Whether a repair is needed is tested on the device in use: GPUs have other kernels.
"""

import paddle
from paddle import _C_ops

# Below -84.28, x · exp(-x) overflows float32 in Paddle's formula. Below -80, silu and its gradient are below 1e-32.
LOWEST = -80.0


def repair_kernels() -> None:
    """Repair each kernel of `REPAIRS` whose gradient is wrong on this device. Further calls change nothing."""
    for name, (is_broken, repaired) in REPAIRS.items():
        if is_broken():
            setattr(_C_ops, name, repaired(getattr(_C_ops, name)))


def silu_gradient_is_broken() -> bool:
    """Whether the gradient of silu at -100, which is 0, is computed as NaN."""
    number = paddle.full([1], -100.0)
    number.stop_gradient = False
    try:
        paddle.nn.functional.silu(number).backward()
    except RuntimeError:  # with FLAGS_check_nan_inf, which a user may have set
        return True
    return bool(paddle.isnan(number.grad))


def repaired_silu(original):
    """Silu that is constant below `LOWEST`: only the NaN, which would end a run, changes."""
    return lambda x, *options: original(paddle.clip(x, min=LOWEST), *options)


def layer_norm_gradient_is_broken() -> bool:
    """Whether a gradient passes through a frozen weight of zeros, which should make it zero."""
    x = paddle.to_tensor([[0.0, 0.0, 1.0]], stop_gradient=False)
    y = paddle.nn.functional.layer_norm(x, 3, paddle.zeros([3]))
    (y * paddle.to_tensor([1.0, 0.0, 0.0])).sum().backward()
    return bool(x.grad.abs().sum() > 0)


def repaired_layer_norm(original):
    """Layer norm that computes the weight's gradient whenever it computes that of `x`.

    The kernel ignores a weight without gradient in the gradient of `x`. So the weight gets one: the forward pass has
    the same bits, and the backward pass those of a trainable weight. `paddle.grad` is not repaired: use `backward`.
    """

    def layer_norm(x, weight, *options):
        if weight is not None and weight.stop_gradient and not x.stop_gradient:
            weight = wanting_gradient(weight)
        return original(x, weight, *options)

    return layer_norm


def group_norm_gradient_is_broken() -> bool:
    """Whether the sum of a normalized group, which is always 0, has a gradient without a weight."""
    x = paddle.to_tensor([[[0.0, 0.0, 1.0]]], stop_gradient=False)
    _C_ops.group_norm(x, None, None, 1e-5, 1, "NCHW").sum().backward()
    return bool(x.grad.abs().max() > 1e-3)


def repaired_group_norm(original):
    """Group norm with a weight of ones if it has none: without a weight, the gradient lacks a term.

    Paddle 2.6's kernel also fails if the weight or the bias needs a gradient and `x` does not; so `x` always gets one.
    """

    def group_norm(x, weight, bias, epsilon, groups, data_format):
        if weight is None:
            weight = paddle.ones([x.shape[1 if data_format.startswith("NC") else -1]], x.dtype)
        if x.stop_gradient and not all(tensor is None or tensor.stop_gradient for tensor in (weight, bias)):
            x = wanting_gradient(x)
        return original(x, weight, bias, epsilon, groups, data_format)

    return group_norm


def wanting_gradient(tensor):
    """A detached tensor with the same values whose gradient is computed."""
    twin = tensor.detach()
    twin.stop_gradient = False
    return twin


# {kernel: (whether it is broken, what makes its replacement)}
REPAIRS = {
    "silu": (silu_gradient_is_broken, repaired_silu),
    "layer_norm": (layer_norm_gradient_is_broken, repaired_layer_norm),
    "group_norm": (group_norm_gradient_is_broken, repaired_group_norm),
}
