"""Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682, algorithm 1)."""

from ppdiffusers_train.runtime.optimizers.rules import RuleOptimizer


class ScheduleFree(RuleOptimizer):
    """Gradients are taken at y = (1 - β1) z + β1 x, where z takes the steps and x is the average of z, the result.

    The parameters hold y, the state holds z, and x follows from both.
    """

    defaults = {
        "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.0,
        "r": 0.0,  # power of the step in the weight of an average
        "weight_lr_power": 2.0,  # power of the largest rate so far in this weight
    }  # fmt: skip
    positive, averages = ("beta1", "epsilon"), True

    def __init__(self, learning_rate, parameters, rounding=None, **options):
        super().__init__(learning_rate, parameters, rounding, **options)
        self.shared = {"step": 0, "largest_rate": -1.0, "weight_sum": 0.0}

    @staticmethod
    def layout(shape, options):
        return {"z": (shape, "float32"), "moment2": (shape, "float32")}

    def initial_state(self, parameter):
        return {**super().initial_state(parameter), "z": parameter.astype("float32").clone()}

    def begin_step(self):
        options, shared = self.options, self.shared
        step, largest = shared["step"] + 1, max(shared["largest_rate"], self.get_lr())
        weight = step ** options["r"] * largest ** options["weight_lr_power"]
        total = shared["weight_sum"] + weight
        self.shared = {"step": step, "largest_rate": largest, "weight_sum": total}
        self.options = {**options, "step": step, "share": weight / total if total else 0.0}

    @staticmethod
    def update(value, gradient, state, step, rate, options):
        beta1, beta2, share, z = options["beta1"], options["beta2"], options["share"], state["z"]
        moment2 = beta2 * state["moment2"] + (1 - beta2) * gradient.square()
        change = gradient / ((moment2 / (1 - beta2 ** options["step"])).sqrt() + options["epsilon"])
        change = change + options["weight_decay"] * value
        value = value + share * (z - value) + rate * (beta1 * (1 - share) - 1) * change
        return value, {"z": z - rate * change, "moment2": moment2}

    def evaluation_value(self, parameter):
        """x of a parameter, float32; the parameter itself before its first update."""
        state, beta1 = self.states.get(parameter.name), self.options["beta1"]
        return parameter if state is None else (parameter - (1 - beta1) * state["z"]) / beta1
