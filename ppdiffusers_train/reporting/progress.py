"""The progress of a run on the screen."""

import resource
import sys

import paddle

from ppdiffusers_train.reporting.status_line import StatusLine


def memory_gb() -> float:
    """Peak memory so far, in GB: of the GPU where there is one, else of this process."""
    if paddle.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Progress(StatusLine):
    """The run's status line: steps, time left, loss, learning rate, samples per second, memory, utilisation.

    Args:
        step, total_steps: the current and the last step of the run.
        visible: whether this rank shows the line.
        peak_tflops: of all GPUs together, or None if unknown; then no utilisation is shown.
    """

    def __init__(self, step: int, total_steps: int, visible: bool, peak_tflops=None):
        super().__init__("training", "steps", total_steps, step, visible, least_seconds=0)
        self.samples = 0
        self.peak_tflops, self.flops_per_sample = peak_tflops, None

    @property
    def counts_next(self) -> bool:
        """Whether the next step's operations are to be counted."""
        return self.peak_tflops is not None and self.flops_per_sample is None

    def counted(self, flops: int, samples: int) -> None:
        """Set the number of operations per sample, unless nothing was counted."""
        if flops and samples:
            self.flops_per_sample = flops / samples

    def utilisation(self, rate: float) -> str:
        """The share of peak performance at `rate` samples per second, as text; empty if unknown."""
        if self.flops_per_sample is None:
            return ""
        return f" {rate * self.flops_per_sample / 1e12 / self.peak_tflops:.0%} of peak"

    def add_step(self, loss: float, learning_rate: float, samples: int, skipped: int = 0) -> float:
        """Advance by one step of `samples` samples. Returns the samples per second so far, of training alone.

        Args:
            skipped: steps of the run so far that were skipped because of NaN or inf, overflow in float16 included.
        """
        self.samples += samples
        rate = self.samples / self.seconds
        figures = f"loss={loss:.4f} lr={learning_rate:.2e} {rate:.1f} samples/s {memory_gb():.1f} GB"
        self.advance(1, figures + self.utilisation(rate) + (f" skipped={skipped}" if skipped else ""))
        return rate
