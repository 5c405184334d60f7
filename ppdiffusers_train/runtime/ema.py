"""An exponential moving average of the trained weights."""

import paddle

from ppdiffusers_train.runtime.precision import holding


def ema_decay(update: int, max_decay: float = 0.9999) -> float:
    """Decay of the `update`-th update, counted from 1: min(max_decay, (1 + s) / (10 + s)) with s = update - 1.

    The first update has decay 0, so the average starts at trained weights, and the initial ones do not dominate short
    runs (as in diffusers' `EMAModel`).
    """
    past = update - 1
    return 0.0 if past <= 0 else min(max_decay, (1 + past) / (10 + past))


@paddle.no_grad()
def move_average(averages, parameters, decay: float) -> None:
    """θ⁻ ← μ θ⁻ + (1 - μ) θ, in place, of parameters in the same order."""
    for average, parameter in zip(averages, parameters, strict=True):
        replace(average, decay * average + (1 - decay) * parameter.astype("float32"))


def replace(tensor, value) -> None:
    """Copy values into a tensor on its device. In Paddle 2.6, `set_value` would copy through NumPy."""
    paddle.assign(value, output=tensor)


class EMA:
    """θ_ema ← d · θ_ema + (1 - d) · θ, in float32.

    Args:
        parameters: `{structured name: parameter}` to average.
    """

    def __init__(self, parameters: dict):
        self.parameters, self.updates = parameters, 0
        self.averages = {name: parameter.detach().clone().astype("float32") for name, parameter in parameters.items()}

    @paddle.no_grad()
    def update(self, values=None) -> None:
        """Update the averages after a step.

        Args:
            values: (structured name, float32 tensor) of each parameter; by default, the parameters themselves.
        """
        values = self.parameters.items() if values is None else values
        self.updates += 1
        decay = ema_decay(self.updates)
        for name, value in values:
            replace(self.averages[name], decay * self.averages[name] + (1 - decay) * value)

    def applied(self):
        """A context in which the parameters hold the averages in float32; afterwards they hold their own values."""
        return holding([(parameter, self.averages[name]) for name, parameter in self.parameters.items()])
