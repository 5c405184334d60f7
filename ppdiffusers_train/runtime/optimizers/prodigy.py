"""Prodigy (Mishchenko & Defazio 2023, arXiv 2306.06101, algorithm 4): AdamW that finds its learning rate."""

import math

import paddle

from ppdiffusers_train.runtime.optimizers.rules import RuleOptimizer


class Prodigy(RuleOptimizer):
    """Multiplies the learning rate, usually 1, by d, an estimate of the distance to the solution that only grows.

    The estimate needs the gradients of all parameters, and fetches two numbers per step from the device.
    """

    defaults = {
        "beta1": 0.9, "beta2": 0.999,
        "beta3": 0.0,  # decay of the estimate; 0: the root of beta2
        "epsilon": 1e-8, "weight_decay": 0.0, "use_bias_correction": False,
        "safeguard_warmup": False,  # leave the learning rate out of the estimate, so that warm-up does not hurt it
        "d0": 1e-6, "d_coef": 1.0, "growth_rate": math.inf,
    }  # fmt: skip
    bytes_per_element = 28
    positive, needs_all_gradients = ("d0", "d_coef", "epsilon"), True

    def __init__(self, learning_rate, parameters, rounding=None, **options):
        super().__init__(learning_rate, parameters, rounding, **options)
        self.shared = {"d": self.options["d0"], "d_max": self.options["d0"], "numerator": 0.0, "step": 0}

    @staticmethod
    def layout(shape, options):
        return {name: (shape, "float32") for name in ("moment1", "moment2", "sum", "start")}

    def initial_state(self, parameter):
        return {**super().initial_state(parameter), "start": parameter.astype("float32").clone()}

    @paddle.no_grad()
    def _apply_optimize(self, loss, startup_program, params_grads, param_group_idx=0):
        options, shared = self.options, self.shared
        rate = self.get_lr() * bias_correction(shared["step"] + 1, options)
        products, sums = [], []
        for parameter, gradient in params_grads:
            state = self.states.get(parameter.name) or self.initial_state(parameter)
            self.states[parameter.name], product = accumulate(parameter, gradient, state, shared["d"], rate, options)
            products.append(product)
            sums.append(self.states[parameter.name]["sum"].abs().sum())
        if not sums:
            return
        d = shared["d"]
        product, total = (paddle.stack(values).astype("float64").sum() for values in (products, sums))
        product, total = paddle.stack([product, total]).tolist()
        if total:
            shared |= next_distance(shared, product * (d / options["d0"]) * d * rate, total, options)
        self.shared = {**shared, "step": shared["step"] + 1}
        # As in the reference, a step has the size of the estimate before it, and its epsilon that of the one after it.
        options = {**options, "step_size": d * rate, "d": self.shared["d"]}
        self.options, before = options, self.options
        try:
            super()._apply_optimize(loss, startup_program, params_grads)
        finally:
            self.options = before

    @staticmethod
    def update(value, gradient, state, step, rate, options):
        size = options["step_size"]
        change = state["moment1"] / (state["moment2"].sqrt() + options["d"] * options["epsilon"])
        # A size far below float32's precision, as the first ones are, would be lost in 1 - size.
        return value - (options["weight_decay"] * size) * value - size * change, state


def bias_correction(step: int, options: dict) -> float:
    """The factor of Adam's bias correction, or 1."""
    if not options["use_bias_correction"]:
        return 1.0
    return (1 - options["beta2"] ** step) ** 0.5 / (1 - options["beta1"] ** step)


def accumulate(parameter, gradient, state: dict, d: float, rate: float, options: dict) -> tuple:
    """(new state, <gradient, start - parameter>): moments of d · gradient, and the denominator's sum."""
    value, gradient = parameter.astype("float32"), gradient.astype("float32")
    beta1, beta2, beta3 = options["beta1"], options["beta2"], options["beta3"] or options["beta2"] ** 0.5
    product = paddle.dot(gradient.flatten(), (state["start"] - value).flatten())
    weight = d / options["d0"] * d * (1 if options["safeguard_warmup"] else rate)
    return {
        **state,
        "moment1": beta1 * state["moment1"] + d * (1 - beta1) * gradient,
        "moment2": beta2 * state["moment2"] + d * d * (1 - beta2) * gradient.square(),
        "sum": beta3 * state["sum"] + weight * gradient,
    }, product


def next_distance(shared: dict, product: float, total: float, options: dict) -> dict:
    """The estimate after a step: the numbers of `shared` that change."""
    numerator = (options["beta3"] or options["beta2"] ** 0.5) * shared["numerator"] + product
    found = options["d_coef"] * numerator / total
    d = max(shared["d"], found) if shared["d"] == options["d0"] else shared["d"]
    d_max = max(shared["d_max"], found)
    return {"numerator": numerator, "d_max": d_max, "d": min(d_max, d * options["growth_rate"])}
