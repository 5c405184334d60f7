"""The scale of a loss in float16, whose gradients would else be too small for that type."""

LARGEST_FIRST, GROW_AFTER = 65536.0, 2000  # Paddle's GradScaler begins and grows alike


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2017, arXiv 1710.03740, section 3.2): halved by a step whose gradients
    overflow, doubled after `GROW_AFTER` steps without one.

    Paddle's `GradScaler` decides inside the optimizer's step, which only Paddle's own optimizers then leave out. Here
    the verdict comes before any optimizer is called, so what is left to do is this bookkeeping.

    Args:
        enabled: else the scale is 1 and stays so.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.value = LARGEST_FIRST if enabled else 1.0
        self.good_steps = 0  # since the scale changed

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow may be the scale's fault: else a smaller one will not help."""
        return self.enabled and self.value > 1.0

    def update(self, overflowed: bool) -> None:
        """Follow a step."""
        if not self.enabled:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps == GROW_AFTER:
            self.value, self.good_steps = self.value * 2, 0

    def state_dict(self) -> dict:
        """What a checkpoint holds, under the names of Paddle's `GradScaler`; empty where nothing is scaled."""
        return {"scale": [self.value], "incr_count": self.good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned; after a run in another precision, nothing."""
        if self.enabled and state:
            self.value, self.good_steps = float(state["scale"][0]), int(state["incr_count"])
