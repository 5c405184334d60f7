"""Trained weights in bfloat16 without float32 copies: `--param_dtype bf16`.

Weights of linear layers and convolutions are kept in bfloat16; those of other layers, and biases, are few and stay
float32. An update is computed in float32, and its result rounded so that small updates are not lost (Zamirai et al.
2020, arXiv 2010.06192). Without autocast, as on CPUs, computing stays in float32: a layer widens its weight in its
forward and again in its backward pass.
"""

from functools import cache

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from ppdiffusers_train.draws import generator
from ppdiffusers_train.runtime.precision import share_storage
from ppdiffusers_train.runtime.quantized import KNOWN, QuantizedConv, QuantizedLinear

LOW_BITS = 2**16  # float32's bits that bfloat16 lacks
STRIDES = "FLAGS_use_stride_kernel"  # without it, Paddle has no kernel that views a tensor in another dtype


class Rounding:
    """Rounds updated float32 values of a parameter to bfloat16.

    Args:
        kind: "stochastic", up or down with the probability that leaves the mean as it is; or "kahan", to the nearest,
            with what was lost kept in bfloat16 and added before the next update.
        seed: the run's.
        names: {parameter's name: its structured name}.
    """

    LOST = "lost"  # name in the optimizer's state

    def __init__(self, kind: str, seed: int, names: dict):
        self.kind, self.seed, self.names = kind, seed, names

    def layout(self, shape: list) -> dict:
        """{name: (shape, dtype)} of what is kept beside a parameter."""
        return {self.LOST: (shape, "bfloat16")} if self.kind == "kahan" else {}

    def take(self, state: dict):
        """Remove from a parameter's state what was lost so far, and return it; None if nothing is kept."""
        return state.pop(self.LOST, None)

    @staticmethod
    def widen(parameter, lost):
        """The float32 value that is updated."""
        value = parameter.astype("float32")
        return value if lost is None else value + lost.astype("float32")

    def store(self, parameter, value, step: int) -> dict:
        """Set a parameter to the rounded value; returns what is kept beside it.

        Args:
            step: the number of this update of the parameter.
        """
        if self.kind == "kahan":
            rounded = value.astype("bfloat16")
            paddle.assign(rounded, output=parameter)
            return {self.LOST: (value - rounded.astype("float32")).astype("bfloat16")}
        bits = random_bits(self.seed, step, self.names[parameter.name], value.size)
        paddle.assign(round_up(value, bits), output=parameter)
        return {}


def random_bits(seed: int, step: int, name: str, size: int) -> np.ndarray:
    """[size] int16, all values equally likely, as a function of (seed, step, parameter's structured name)."""
    words = generator(seed, step, f"rounding of {name}").bit_generator.random_raw(-(-size // 4))
    return words.view(np.int16)[:size]


def round_up(value, bits: np.ndarray):
    """A float32 tensor in bfloat16: cut off after a random number below the last bit that stays was added.

    Magnitudes are rounded up with the probability that is the fraction cut off.
    """
    before = paddle.get_flags(STRIDES)[STRIDES]
    paddle.set_flags({STRIDES: True})  # here, because a backward pass may be without
    try:
        noise = paddle.to_tensor(bits).astype("int32").reshape(value.shape) % LOW_BITS
        whole = (value.view("int32") + noise) // LOW_BITS * LOW_BITS
        return whole.view("float32").astype("bfloat16")
    finally:
        paddle.set_flags({STRIDES: before})


class WideProduct(PyLayer):
    """`layer.product(x, weight)` in float32 with a weight in bfloat16, which is widened in both passes.

    The gradient of the weight is rounded to bfloat16, as it is on GPUs.
    """

    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.is_constant = layer, x.stop_gradient  # a recomputed block gives back tensors without this
        return layer.product(x, weight.astype(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensor()
        own, wide = x.detach(), weight.detach().astype(x.dtype)
        own.stop_gradient, wide.stop_gradient = ctx.is_constant, False
        with paddle.enable_grad():
            y = ctx.layer.product(own, wide)
        y.backward(gradient)
        return own.grad, wide.grad.astype(weight.dtype)


class Wide:
    """A layer with a weight in bfloat16 that computes in the type of its input."""

    def forward(self, x, scale=1.0):
        """The layer's own output."""
        y = WideProduct.apply(x, self.weight, self)
        return y if self.bias is None else y + self.bias.reshape(self.bias_shape)


@cache
def wide_class(layer_class):
    """A class of layers with weights in bfloat16, which stay instances of their class."""
    kind = QuantizedLinear if issubclass(layer_class, nn.Linear) else QuantizedConv
    parts = {name: vars(kind)[name] for name in ("bias_shape", "product")}
    return type(f"Wide{layer_class.__name__}", (Wide, layer_class), parts)


def narrow_layers(model) -> list:
    """The layers of a model whose weights are trained and are kept in bfloat16.

    Not the first parameter: ppdiffusers' models take the type that they compute in from it.
    """
    first = model.parameters()[0]
    found = [layer for layer in model.sublayers(include_self=True) if type(layer).__name__ in KNOWN]
    found = [layer for layer in found if isinstance(layer, nn.Linear) or layer._padding_mode == "zeros"]
    return [layer for layer in found if not layer.weight.stop_gradient and layer.weight is not first]


@paddle.no_grad()
def narrow_models(models, widens: bool) -> None:
    """Round the trained weights of models to bfloat16, one layer after the other.

    Args:
        widens: whether layers have to widen their weights, because the run does not compute in bfloat16.
    """
    for model in models:
        for layer in narrow_layers(model):
            share_storage(layer.weight, layer.weight.astype("bfloat16"))
            if widens:
                layer.__class__ = wide_class(type(layer))
