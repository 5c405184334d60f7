"""Memory of a training run: tensors that stay are counted, temporary ones are measured."""

import gc
import os
from dataclasses import dataclass

import numpy as np
import paddle
from paddle.base import core

from ppdiffusers_train.cpu import patches
from ppdiffusers_train.runtime.bf16_weights import narrow_layers
from ppdiffusers_train.runtime.gradient_sums import BUCKET_BYTES, BUCKETS_IN_FLIGHT
from ppdiffusers_train.runtime.optimizers import registry
from ppdiffusers_train.runtime.precision import DTYPES, is_trained_without_lora, keeps_float32
from ppdiffusers_train.runtime.quantized import code_bytes

IN_FLIGHT_BYTES = (BUCKETS_IN_FLIGHT + 1) * BUCKET_BYTES  # copies of gradients on several ranks; one is being filled
EMA_UPDATE_BYTES = 12  # for each element of a parameter whose average is updated: two products and their sum


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
    cached: bool  # samples are cached, so the encoders are freed
    ranks: int
    optimizer: str = "adamw"
    optimizer_options: tuple = ()  # (name, value) of those that are not the defaults
    fused_backward: bool = False
    param_dtype: str = "float32"
    param_rounding: str = "stochastic"

    @property
    def optimizer_name(self) -> str:
        """The optimizer of both flags."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer

    def state_bytes(self, shape) -> int:
        """Bytes of the optimizer's state of a parameter of this shape."""
        return optimizer_state_bytes(self.optimizer_name, self.optimizer_options, shape, self.param_dtype == "bf16")


@dataclass(frozen=True)
class Inventory:
    """The sizes of a job's tensors.

    Args:
        trained: numbers of elements of the trainable parameters.
        lowered: how many of these elements O2 keeps in 16 bits: those of models without LoRA.
        frozen: `{model: {mixed precision: bytes}}` of the frozen weights of models that training needs.
        encoders: the same of models that a cache replaces.
        float32_beside: number of frozen elements that stay float32 in models that are trained without LoRA; autocast
            makes 16-bit copies of those, too.
        activations: `{with recomputation: peak bytes of a sample's forward and backward pass in float32}`.
        encoding: peak bytes while a sample is encoded.
        encoded: bytes of an encoded sample.
        shapes: of the trainable parameters.
        narrow: how many of their elements `--param_dtype bf16` keeps in 16 bits.
    """

    trained: tuple
    lowered: int
    frozen: dict
    encoders: dict
    float32_beside: int
    activations: dict
    encoding: int
    encoded: int
    shapes: tuple = ()
    narrow: int = 0

    def memory(self, options: Options) -> dict:
        """Bytes per device by kind, during training. Weights, gradients, moments and averages are counted. In 16 bits,
        activations are taken as half of those in float32, plus autocast's copies of float32 weights."""
        elements, precision = sum(self.trained), options.mixed_precision
        lowered = self._lowered(options)
        narrow = self.narrow if options.param_dtype == "bf16" else 0
        lost = 2 * narrow if options.param_rounding == "kahan" else 0
        activations = self.activations[options.gradient_checkpointing] * options.train_batch_size
        if precision != "no":
            activations = activations // 2 + 2 * (elements - lowered + self.float32_beside)
        gradients = 4 * (max(self.trained) if options.fused_backward else elements)
        if options.fused_backward:
            activations += self.updating(options)
        return {
            "trainable weights": 4 * elements - 2 * (lowered + narrow),
            "frozen weights": in_bytes(self.frozen, precision),
            "encoders": 0 if options.cached else in_bytes(self.encoders, precision),
            "gradients": gradients + (min(4 * elements, IN_FLIGHT_BYTES) if options.ranks > 1 else 0),
            "optimizer": (sum(map(options.state_bytes, self.shapes)) + lost + 4 * lowered) // options.sharding_degree,
            "EMA": 4 * elements if options.use_ema else 0,
            "activations": max(activations, 0 if options.cached else self.encoding, self.updating(options)),
        }

    def _lowered(self, options: Options) -> int:
        """Number of trainable elements that are kept in 16 bits."""
        return self.lowered if options.mixed_precision != "no" and options.amp_level == "O2" else 0

    def updating(self, options: Options) -> int:
        """Temporary bytes while the largest parameter is updated, after the activations have been freed."""
        largest = max(self.trained)
        return max(
            registry.update_bytes(options.optimizer_name, largest, options.param_dtype == "bf16"),
            EMA_UPDATE_BYTES * largest if options.use_ema else 0,
        )

    def phases(self, options: Options) -> dict:
        """Peak bytes per device of each phase of a run. Models are loaded in float32, and cast when all are loaded; the
        encoders of a cache are loaded later, while nothing else is in memory. Gradients and moments are allocated by
        the first step."""
        training, precision = self.memory(options), options.mixed_precision
        narrow = 2 * self.narrow if options.param_dtype == "bf16" else 0  # rounded while they are read
        loaded = 4 * sum(self.trained) - narrow + in_bytes(self.frozen, "no")
        if not options.cached:
            loaded += in_bytes(self.encoders, "no")
        phases = {"loading": loaded + training["EMA"], "training": sum(training.values())}
        if options.cached:
            cast = [sizes["no"] - sizes[precision] for sizes in self.encoders.values()]  # one after the other
            phases["filling the cache"] = in_bytes(self.encoders, precision) + max(self.encoding, *cast)
        return phases

    def peak(self, options: Options) -> int:
        """The peak of a run, in bytes per device."""
        return max(self.phases(options).values())


def in_bytes(parts: dict, mixed_precision: str) -> int:
    """Total bytes of `Inventory.frozen` or `Inventory.encoders` in a precision."""
    return sum(sizes[mixed_precision] for sizes in parts.values())


def compute_on_cpu() -> None:
    """Compute on the CPU even if there are GPUs, because `Peaks` measures the host's memory alone.

    If there are, Paddle's own functions are measured, as they run on GPUs: patches for CPUs need less memory. Call it
    before models are built and ranks are started.
    """
    if not paddle.get_device().startswith("cpu"):
        os.environ.setdefault(patches.VARIABLE, "none")
    paddle.set_device("cpu")
    os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"  # also for ranks that were launched on GPUs


def optimizer_state_bytes(name: str, options, shape, is_bf16: bool) -> int:
    """Bytes of an optimizer's state of a parameter; Paddle's AdamW also keeps two powers of beta."""
    return registry.state_bytes(name, shape, dict(options)) + (8 if name == "adamw" and not is_bf16 else 0)


def take_inventory(module, activations: dict, encoding: int, encoded: int) -> Inventory:
    """Count a `DiffusionTrainingModule`'s parameters and buffers."""
    module.load_rest()
    trained = {id(parameter): parameter.size for parameter in module.trainable_parameters()}
    models, without_lora = dict(module.named_children()), {}
    frozen = {
        name: {precision: frozen_bytes(module, name, precision) for precision in ("no", *DTYPES)} for name in models
    }
    for name, model in models.items():
        if is_trained_without_lora(model):
            without_lora[name] = sum(parameter.size for parameter in model.parameters() if id(parameter) in trained)
    encoders = {name: frozen.pop(name) for name in module.encoders}
    return Inventory(
        tuple(trained.values()), sum(without_lora.values()), frozen, encoders,
        sum(frozen[name]["no"] // 4 for name in without_lora), activations, encoding, encoded,
        tuple(tuple(parameter.shape) for parameter in module.trainable_parameters()),
        sum(layer.weight.size for name in without_lora for layer in narrow_layers(models[name])),
    )  # fmt: skip


def frozen_bytes(module, name: str, mixed_precision: str) -> int:
    """Bytes of the frozen parameters of a module's model after `Precision.cast_models`, of the codes of quantized
    weights, and of its floating-point buffers, such as scales of these codes and SD3's position embeddings.

    In float16, Paddle keeps layer norms in float32: too few elements to be counted.
    """
    model = getattr(module, name)
    parameters = [parameter for parameter in model.parameters() if parameter.stop_gradient]
    buffers = sum(buffer.size for buffer in model.buffers() if buffer.is_floating_point())
    kept = sum(parameter.size for parameter in parameters if getattr(parameter, "stays_frozen", False))
    size = sum(parameter.size for parameter in parameters)
    if mixed_precision == "no" or is_trained_without_lora(model) or keeps_float32(module, name, mixed_precision):
        return 4 * (size + buffers) + code_bytes(model)
    return 4 * (kept + buffers) + 2 * (size - kept) + code_bytes(model)


class Peaks:
    """A context that measures the peak of Paddle's allocations in each stretch of time, in bytes above the level at the
    beginning.

    A stretch ends where `mark` is called. Paddle reports only the peak of the whole process, so each stretch begins at
    that peak: the difference is allocated and never written to, which takes no real memory.
    """

    def __init__(self):
        gc.collect()  # else what Python frees later would be missing from the levels
        self.fillers, self.base = [], allocated()
        self.levels, self.peaks = [0], []  # levels at the beginning and at the ends of stretches; peaks within each

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
        # In pieces: a system may refuse one allocation that is larger than its free memory.
        while missing := min(highest() - allocated(), 2**30):
            self.fillers.append(paddle.empty([missing], "uint8"))


def allocated() -> int:
    """Bytes that Paddle currently has allocated on the host."""
    return core.host_memory_stat_current_value("Allocated", 0)


def highest() -> int:
    """The peak of Paddle's allocations on the host in this process, in bytes."""
    return core.host_memory_stat_peak_value("Allocated", 0)


class StepMeter:
    """Measures training steps. Gradients of `parameters` are freed at once, because they are counted elsewhere."""

    def __init__(self, parameters: list):
        self.peaks = None
        for parameter in parameters:  # hooks cannot be removed, so they are registered once
            parameter._register_backward_hook(lambda parameter=parameter: self._drop(parameter))

    def _drop(self, parameter) -> None:
        self.peaks.mark()
        parameter.clear_gradient(False)

    def measure(self, loss) -> Peaks:
        """Memory during `loss()`, and during its backward pass in stretches that end with a parameter's gradient."""
        with Peaks() as self.peaks:
            value = loss()
            self.peaks.mark()
            value.backward()
            self.peaks.mark()
        return self.peaks


def extrapolate(sizes: list, measured, size: int) -> np.ndarray:
    """Extrapolate quantities from smaller sizes to `size`: [n].

    Args:
        sizes: image heights in pixels, as many as the polynomials have coefficients, or `size` alone.
        measured: [len(sizes), n], the quantities at each of them. Each is a polynomial of degree 2 in the number of
            pixels: text is constant, convolutions are linear, attention is quadratic.
    """
    pixels = np.asarray(sizes, dtype=np.float64) ** 2
    coefficients = np.linalg.solve(np.vander(pixels), np.asarray(measured, dtype=np.float64))
    return (np.vander([float(size) ** 2], len(sizes)) @ coefficients)[0]


def extrapolate_peak(sizes: list, measured: list, size: int) -> int:
    """The peak of memory at `size`, from `Peaks` of the same stretches at each of `sizes`.

    Levels between stretches are sums of tensor sizes, and so polynomials. The rise above them within a stretch is a
    maximum of several sums: it is taken to grow as it did between the two largest sizes, at most with the square of the
    number of pixels.
    """
    levels = extrapolate(sizes, [peaks.levels for peaks in measured], size)
    levels = np.maximum(levels[:-1], levels[1:])
    above = np.float64([np.maximum(np.subtract(p.peaks, np.maximum(p.levels[:-1], p.levels[1:])), 1) for p in measured])
    if len(sizes) > 1:
        growth = np.log(above[-1] / above[-2]) / (2 * np.log(sizes[-1] / sizes[-2]))
        above = above[-1:] * (size / sizes[-1]) ** (2 * np.clip(growth, 0, 2))
    return int(np.max(levels + above[-1]))
