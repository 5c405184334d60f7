"""Loss scaling for float16, whose range is too small for many gradients."""

LARGEST_FIRST, GROW_AFTER = 65536.0, 2000  # the defaults of Paddle's GradScaler


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2017, arXiv 1710.03740, section 3.2): halved by a step whose gradients
    overflow, doubled after `GROW_AFTER` steps without an overflow.

    Paddle's `GradScaler` skips a step inside the optimizer, which only Paddle's own optimizers support. Here overflows
    are detected before the optimizer is called, so only the scale is left to update.

    Args:
        enabled: whether losses are scaled; otherwise the scale is always 1.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.value = LARGEST_FIRST if enabled else 1.0
        self.good_steps = 0  # since the scale last changed

    @property
    def can_shrink(self) -> bool:
        """Whether the scale can be reduced after an overflow; at 1, a smaller one would not help."""
        return self.enabled and self.value > 1.0

    def update(self, overflowed: bool) -> None:
        """Update the scale after a step."""
        if not self.enabled:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps == GROW_AFTER:
            self.value, self.good_steps = self.value * 2, 0

    def state_dict(self) -> dict:
        """The state for a checkpoint, under the names of Paddle's `GradScaler`; empty if losses are not scaled."""
        return {"scale": [self.value], "incr_count": self.good_steps} if self.enabled else {}

    def load_state_dict(self, state: dict) -> None:
        """Load what `state_dict` returned; ignored if either run has no loss scaling."""
        if self.enabled and state:
            self.value, self.good_steps = float(state["scale"][0]), int(state["incr_count"])
