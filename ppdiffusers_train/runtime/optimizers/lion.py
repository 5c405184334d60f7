"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""

from ppdiffusers_train.runtime.optimizers.rules import RuleOptimizer


class Lion(RuleOptimizer):
    """Steps of the same size in each element, whose sign is that of an average of gradients: one moment."""

    defaults = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}

    @staticmethod
    def layout(shape, options):
        return {"moment": (shape, "float32")}

    @staticmethod
    def update(value, gradient, state, step, rate, options):
        beta1, beta2, moment = options["beta1"], options["beta2"], state["moment"]
        direction = (beta1 * moment + (1 - beta1) * gradient).sign()
        moment = beta2 * moment + (1 - beta2) * gradient
        return value * (1 - rate * options["weight_decay"]) - rate * direction, {"moment": moment}
