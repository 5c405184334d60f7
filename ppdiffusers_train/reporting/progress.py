"""What a run says on the screen: one line that moves, and single lines above it."""

import contextlib
import resource
import sys
import time

import paddle
from tqdm import tqdm


def memory_gb() -> float:
    """Peak memory so far: of the card where there is one, else of this process."""
    if paddle.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Progress:
    """The run's progress line: steps, time left, loss, learning rate, samples per second, memory, utilisation.

    Args:
        step, total_steps: where the run stands and ends.
        visible: whether this rank speaks.
        peak_tflops: of all cards together, or None where it is not known; then there is no utilisation.
    """

    def __init__(self, step: int, total_steps: int, visible: bool, peak_tflops=None):
        self.bar = tqdm(
            total=total_steps, initial=step, desc="training", unit="step", disable=not visible, dynamic_ncols=True
        )
        self.samples, self.started = 0, time.monotonic()
        self.peak_tflops, self.flops_per_sample = peak_tflops, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def counts_next(self) -> bool:
        """Whether the next step's operations are to be counted."""
        return self.peak_tflops is not None and self.flops_per_sample is None

    def counted(self, flops: int, samples: int) -> None:
        """Take over what was counted; nothing where nothing was."""
        if flops and samples:
            self.flops_per_sample = flops / samples

    def utilisation(self, rate: float) -> str:
        """Which share of the peak so many samples per second are, for the line; empty where that is not known."""
        if self.flops_per_sample is None:
            return ""
        return f" {rate * self.flops_per_sample / 1e12 / self.peak_tflops:.0%} of peak"

    def advance(self, loss: float, learning_rate: float, samples: int, skipped: int = 0) -> float:
        """Move on by one step of `samples` samples; returns samples per second so far.

        Args:
            skipped: steps of the run so far whose numbers were NaN, infinite, or too large for float16.
        """
        self.samples += samples
        rate = self.samples / max(time.monotonic() - self.started, 1e-9)
        self.bar.set_postfix_str(
            f"loss={loss:.4f} lr={learning_rate:.2e} {rate:.1f} samples/s {memory_gb():.1f} GB{self.utilisation(rate)}"
            + (f" skipped={skipped}" if skipped else ""),
            refresh=False,
        )
        self.bar.update()
        return rate

    @contextlib.contextmanager
    def paused(self):
        """Within, time does not count: samples per second are those of training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.started += time.monotonic() - began

    def close(self):
        self.bar.close()
