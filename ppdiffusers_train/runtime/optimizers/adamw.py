"""AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2) as a function of tensors."""

from ppdiffusers_train.runtime.optimizers.rules import RuleOptimizer


def adamw(value, gradient, moments: list, step: int, rate: float, options: dict) -> tuple:
    """(new value, new moments) of float32 tensors of the same shape.

    Args:
        moments: both, which are taken out of this list, so that they can be freed.
    """
    moment2, moment1 = moments.pop(), moments.pop()
    beta1, beta2 = options["beta1"], options["beta2"]
    moment1 = beta1 * moment1 + (1 - beta1) * gradient
    moment2 = beta2 * moment2 + (1 - beta2) * gradient.square()
    change = (moment1 / (1 - beta1**step)) / ((moment2 / (1 - beta2**step)).sqrt() + options["epsilon"])
    return value * (1 - rate * options["weight_decay"]) - rate * change, moment1, moment2


class AdamW(RuleOptimizer):
    """AdamW of parameters that Paddle's kernel does not take, which are those in bfloat16."""

    defaults = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.01}
    positive = ("epsilon",)

    bytes_per_element = 24

    @staticmethod
    def layout(shape, options):
        return {"moment1": (shape, "float32"), "moment2": (shape, "float32")}

    @staticmethod
    def update(value, gradient, state, step, rate, options):
        value, first, second = adamw(value, gradient, [state["moment1"], state["moment2"]], step, rate, options)
        return value, {"moment1": first, "moment2": second}
