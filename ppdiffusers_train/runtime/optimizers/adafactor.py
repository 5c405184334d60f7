"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 and 5), with a learning rate from outside."""

from math import prod

import paddle

from ppdiffusers_train.runtime.optimizers.rules import RuleOptimizer


class Adafactor(RuleOptimizer):
    """The second moment of a matrix is kept as its row means and column means.

    A convolution's kernels [N, C, h, w] are the matrix [N, C · h · w]; vectors keep whole second moments.
    """

    positive = ("epsilon1", "clip_threshold")
    defaults = {
        "epsilon1": 1e-30,  # ε1, added to squared gradients
        "epsilon2": 1e-3,  # ε2, the least scale of a parameter
        "clip_threshold": 1.0,  # d, the largest root mean square of an update
        "decay_rate": 0.8,  # of β2 = 1 - step^-decay_rate
        "beta1": 0.0,  # of a first moment; 0: none is kept
        "weight_decay": 0.0,
        "scale_parameter": False,  # multiply the rate by the parameter's root mean square
    }

    bytes_per_element = 12

    @staticmethod
    def layout(shape, options):
        if len(shape) > 1:
            moments = {"row": ([shape[0], 1], "float32"), "column": ([1, prod(shape[1:])], "float32")}
        else:
            moments = {"moment2": (shape, "float32")}
        return {**moments, **({"moment1": (shape, "float32")} if options["beta1"] else {})}

    @staticmethod
    def update(value, gradient, state, step, rate, options):
        change, state = precondition(gradient, dict(state), 1 - step ** -options["decay_rate"], options["epsilon1"])
        change = change / paddle.clip(root_mean_square(change) / options["clip_threshold"], min=1.0)
        if options["scale_parameter"]:
            rate = rate * paddle.clip(root_mean_square(value), min=options["epsilon2"])
        change = rate * change
        if options["beta1"]:
            change = options["beta1"] * state["moment1"] + (1 - options["beta1"]) * change
            state["moment1"] = change
        return value * (1 - options["weight_decay"] * rate) - change, state


def precondition(gradient, state: dict, beta2: float, eps: float) -> tuple:
    """(the gradient divided by the root of its second moment, the new state)."""
    squares = gradient.square() + eps
    if "moment2" in state:
        state["moment2"] = beta2 * state["moment2"] + (1 - beta2) * squares
        return gradient * state["moment2"].rsqrt(), state
    squares = squares.reshape([gradient.shape[0], -1])
    row = state["row"] = beta2 * state["row"] + (1 - beta2) * squares.mean(axis=1, keepdim=True)
    column = state["column"] = beta2 * state["column"] + (1 - beta2) * squares.mean(axis=0, keepdim=True)
    change = gradient.reshape(squares.shape) * (row / row.mean()).rsqrt()
    return (change * column.rsqrt()).reshape(gradient.shape), state


def root_mean_square(values):
    """A float32 scalar."""
    return values.square().mean().sqrt()
