"""The progress line of a run."""

import contextlib
import resource
import sys
import time

import paddle
from tqdm import tqdm


def memory_gb() -> float:
    """Peak memory so far, in GB: of the GPU where there is one, else of this process."""
    if paddle.get_device().startswith("gpu"):
        return paddle.device.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Progress:
    """The run's progress line: steps, time left, loss, learning rate, samples per second, memory, utilisation.

    Args:
        step, total_steps: the current and the last step of the run.
        visible: whether this rank shows the line.
        peak_tflops: of all GPUs together, or None if unknown; then no utilisation is shown.
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
        """Set the number of operations per sample, unless nothing was counted."""
        if flops and samples:
            self.flops_per_sample = flops / samples

    def utilisation(self, rate: float) -> str:
        """The share of peak performance at `rate` samples per second, as text; empty if unknown."""
        if self.flops_per_sample is None:
            return ""
        return f" {rate * self.flops_per_sample / 1e12 / self.peak_tflops:.0%} of peak"

    def advance(self, loss: float, learning_rate: float, samples: int, skipped: int = 0) -> float:
        """Advance by one step of `samples` samples. Returns the samples per second so far.

        Args:
            skipped: steps of the run so far that were skipped because of NaN or inf, overflow in float16 included.
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
        """A context whose time does not count towards samples per second, which are those of training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.started += time.monotonic() - began

    def close(self):
        self.bar.close()
