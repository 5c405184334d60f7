"""What a training step takes in memory: counted for what stays, measured for what comes and goes."""

from dataclasses import dataclass

import numpy as np
import paddle
from paddle.base import core

from ppdiffusers_train.runtime.adamw_8bit import AdamW8bit


@dataclass(frozen=True)
class Options:
    """The flags on which memory depends."""

    train_batch_size: int
    mixed_precision: str
    amp_level: str
    use_ema: bool
    use_8bit_adam: bool
    sharding_degree: int
    gradient_checkpointing: bool
    cached: bool  # encoders are gone


@dataclass(frozen=True)
class Inventory:
    """What a job consists of, in numbers.

    Args:
        learning: sizes of the parameters that learn.
        frozen: how many numbers the frozen parts hold that training needs, by name.
        encoders: the same of those that a cache replaces.
        in_float32: names of the frozen parts that stay in float32.
        activations: `{with recompute?: peak bytes of a sample's forward and backward pass in float32}`.
        encoding: peak bytes while a sample is encoded.
        encoded: bytes of an encoded sample.
    """

    learning: tuple
    frozen: dict
    encoders: dict
    in_float32: tuple
    activations: dict
    encoding: int
    encoded: int

    def memory(self, options: Options) -> dict:
        """Bytes on each card by kind. Weights, gradients, moments and averages are exact; in a low precision,
        activations are taken as half of those in float32, and O1's copies of the weights come with them."""
        low, numbers = options.mixed_precision != "no", sum(self.learning)
        o2 = low and options.amp_level == "O2"
        frozen, encoders = (
            sum(size * (2 if low and name not in self.in_float32 else 4) for name, size in parts.items())
            for parts in (self.frozen, self.encoders)
        )
        moments = AdamW8bit.state_bytes if options.use_8bit_adam else adamw_state_bytes
        activations = self.activations[options.gradient_checkpointing] * options.train_batch_size
        if low:
            activations = activations // 2 + (0 if o2 else 2 * numbers)
        return {
            "weights that learn": numbers * (2 if o2 else 4),
            "frozen weights": frozen,
            "encoders": 0 if options.cached else encoders,
            "gradients": numbers * (2 if o2 else 4),
            "optimizer": sum(map(moments, self.learning)) // options.sharding_degree + (4 * numbers if o2 else 0),
            "EMA": 4 * numbers if options.use_ema else 0,
            "activations": max(activations, 0 if options.cached else self.encoding),
        }


def adamw_state_bytes(size: int) -> int:
    """Bytes of AdamW's state for a parameter of `size` numbers: two moments, two powers of beta."""
    return 8 * size + 8


def take_inventory(module, activations: dict, encoding: int, encoded: int) -> Inventory:
    """Count a `DiffusionTrainingModule`'s parameters."""
    learning = {id(parameter): parameter.size for parameter in module.trainable_parameters()}
    sizes = {
        name: sum(parameter.size for parameter in model.parameters() if id(parameter) not in learning)
        for name, model in module.named_children()
    }
    encoders = {name: sizes.pop(name) for name in module.encoders}
    return Inventory(
        tuple(learning.values()), sizes, encoders, (*module.overflow_float16, *module.always_float32), activations,
        encoding, encoded,
    )  # fmt: skip


class Peaks:
    """The most that Paddle has allocated in each stretch of time, in bytes above what there was at the beginning.

    A context; stretches end where `mark` is called. Paddle knows the highest level of the process alone, so each
    stretch begins at that level: what is missing to it is allocated, and never written to, which costs no memory.
    """

    def __init__(self):
        self.fillers, self.base = [], allocated()
        self.levels, self.peaks = [0], []  # at the beginning and the ends of stretches; within each

    def __enter__(self):
        self._fill_up()
        return self

    def __exit__(self, *_):
        self.fillers.clear()

    def mark(self) -> None:
        """End a stretch."""
        filled = sum(filler.size for filler in self.fillers)
        self.peaks.append(highest() - filled - self.base)
        self.levels.append(allocated() - filled - self.base)
        self._fill_up()

    def _fill_up(self) -> None:
        # In pieces: a system refuses to promise more at once than it has.
        while missing := min(highest() - allocated(), 2**30):
            self.fillers.append(paddle.empty([missing], "uint8"))


def allocated() -> int:
    """Bytes that Paddle has allocated on the host now."""
    return core.host_memory_stat_current_value("Allocated", 0)


def highest() -> int:
    """The most that Paddle has ever allocated on the host, in bytes."""
    return core.host_memory_stat_peak_value("Allocated", 0)


class StepMeter:
    """Measures training steps; the gradients of `parameters` are dropped as they come: they are counted elsewhere."""

    def __init__(self, parameters: list):
        self.peaks = None
        for parameter in parameters:  # hooks cannot be taken back
            parameter._register_backward_hook(lambda parameter=parameter: self._drop(parameter))

    def _drop(self, parameter) -> None:
        self.peaks.mark()
        parameter.clear_gradient(False)

    def measure(self, loss) -> Peaks:
        """Memory during `loss()`, and in each stretch of its backward pass up to a parameter's gradient."""
        with Peaks() as self.peaks:
            value = loss()
            self.peaks.mark()
            value.backward()
            self.peaks.mark()
        return self.peaks


def extrapolate(sizes: list, measured, size: int) -> np.ndarray:
    """Quantities at `size` that were measured at smaller sizes, or at this one: [n].

    Args:
        sizes: heights of an image in pixels, as many as determine the polynomials.
        measured: [len(sizes), n], the quantities at each of them. Each is a polynomial of second degree in the number
            of pixels: text is constant, convolutions are linear, attention is quadratic.
    """
    pixels = np.asarray(sizes, dtype=np.float64) ** 2
    coefficients = np.linalg.solve(np.vander(pixels), np.asarray(measured, dtype=np.float64))
    return (np.vander([float(size) ** 2], len(sizes)) @ coefficients)[0]


def extrapolate_peak(sizes: list, measured: list, size: int) -> int:
    """The highest level of memory at `size`, from `Peaks` of the same stretches at each of `sizes`.

    Levels between stretches are sums of tensors, so polynomials. What rises above them within a stretch is a maximum
    of several: it grows as it did between the two largest sizes, at most with the square of the number of pixels.
    """
    levels = extrapolate(sizes, [peaks.levels for peaks in measured], size)
    levels = np.maximum(levels[:-1], levels[1:])
    above = np.float64([np.maximum(np.subtract(p.peaks, np.maximum(p.levels[:-1], p.levels[1:])), 1) for p in measured])
    if len(sizes) > 1:
        growth = np.log(above[-1] / above[-2]) / (2 * np.log(sizes[-1] / sizes[-2]))
        above = above[-1:] * (size / sizes[-1]) ** (2 * np.clip(growth, 0, 2))
    return int(np.max(levels + above[-1]))
