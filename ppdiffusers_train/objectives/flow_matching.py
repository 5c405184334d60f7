"""Rectified flow as Stable Diffusion 3 is trained with it, as pure functions.

Time t goes from 0, the image, to 1, noise; σ is the share of noise at a time. A model's timestep is σ · T. A table
holds T values of σ in the order of denoising: first σ = 1, last σ near 0. (Liu et al. 2022, arXiv 2209.03003; Esser
et al. 2024, arXiv 2403.03206, "SD3" below.)
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import paddle

from ppdiffusers_train.objectives.noise_schedule import per_sample

LARGEST_MODE_SCALE = 2 / (math.pi - 2)  # above, the mode density's mapping would turn back
GRID = 100_000  # points at which that mapping is inverted


def shifted_sigmas(count: int, shift: float) -> np.ndarray:
    """The table of σ = s · t / (1 + (s - 1) · t) at t = 1, …, 1 / count (SD3, section 5.3.2, eq. 23). float32 [count].

    A shift s above 1 moves them towards noise: larger images need more noise to destroy their content.
    """
    times = np.arange(count, 0, -1, dtype=np.float32) / np.float32(count)
    return np.float32(shift) * times / (1 + (np.float32(shift) - 1) * times)


@dataclass(frozen=True)
class FlowSettings:
    """What a pipeline's scheduler, a `FlowMatchEulerDiscreteScheduler`, says of σ, under its names.

    With `use_dynamic_shifting`, the shift grows with an image's number of tokens (SD3, section 5.3.2): its logarithm is
    a line through (`base_image_seq_len`, `base_shift`) and (`max_image_seq_len`, `max_shift`). With `shift_terminal`,
    the table is stretched so that it ends there.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    shift_terminal: float | None = None

    @classmethod
    def read(cls, config: dict):
        """The settings in a scheduler's configuration.

        Raises:
            ValueError: it asks for a table that is not computed here.
        """
        others = {"time_shift_type": "exponential", "invert_sigmas": False, "stochastic_sampling": False}
        others |= {f"use_{name}_sigmas": False for name in ("karras", "exponential", "beta")}
        for name, expected in others.items():
            if config.get(name, expected) != expected:
                raise ValueError(f"{name}: {config[name]!r}; expected {expected!r}")
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def sigmas(self, count: int, tokens: int, shift: float | None = None) -> np.ndarray:
        """The table of `count` values for an image of `tokens` tokens, or with another shift. float32 [count]."""
        if shift is None:
            shift = self.shift_of(tokens) if self.use_dynamic_shifting else self.shift
        return stretched(shifted_sigmas(count, shift), self.shift_terminal)

    def shift_of(self, tokens: int) -> float:
        """The shift for an image of `tokens` tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return math.exp(self.base_shift + slope * (tokens - self.base_image_seq_len))


def stretched(sigmas: np.ndarray, last: float | None) -> np.ndarray:
    """A table of σ that begins at 1, stretched linearly so that it ends at `last`; None: as it is. [T] -> [T]."""
    if last is None or len(sigmas) == 1:
        return sigmas
    return 1 - (1 - sigmas) * (np.float32(1 - last) / (1 - sigmas[-1]))


def interpolate(sample, noise, sigmas):
    """x = (1 - σ) · x_0 + σ · ε (Rectified flow, section 2.1; SD3, eq. 13). `sample`, `noise` [B, …], `sigmas` [B]."""
    sigmas = per_sample(sigmas, sample)
    return (1 - sigmas) * sample + sigmas * noise


def velocity(sample, noise):
    """v = dx/dσ = ε - x_0: what a model predicts (Rectified flow, eq. 1, with time reversed). [B, …] -> [B, …]."""
    return noise - sample


def timestep_weighting(scheme: str, sigmas: np.ndarray, begin, end, logit_mean, logit_std, mode_scale) -> tuple:
    """The probability of each timestep of the table, [T] float64, and its loss weight, [T], or None for equal weights.

    Args:
        scheme: of `timestep_density`, as are the other arguments, or "bell": drawn uniformly, with `bell_weights`.
        sigmas: the table, [T].
    Raises:
        ValueError: as `timestep_density`.
    """
    count, is_bell = len(sigmas), scheme == "bell"
    density = timestep_density("uniform" if is_bell else scheme, count, begin, end, logit_mean, logit_std, mode_scale)
    return density, paddle.to_tensor(bell_weights(count * sigmas, count)) if is_bell else None


def timestep_density(
    scheme: str, count: int, begin=0.0, end=1.0, logit_mean=0.0, logit_std=1.0, mode_scale=1.29
) -> np.ndarray:
    """The probability of each entry of the table, [count] float64: that of times from t_i - 1 / count to t_i.

    Args:
        scheme: "uniform"; "logit-normal": logit(t) is normal (SD3, eq. 19); "mode": t is f(u; mode_scale) for uniform u
            (SD3, eq. 20).
        begin, end: the part of the table that timesteps are drawn from, from 0 (noise) to 1 (the image).
        logit_mean, logit_std: of logit(t); a mean above 0 prefers noise.
        mode_scale: s; above 0 it prefers the middle, below 0 the ends.
    Raises:
        ValueError: a parameter is invalid; the message names it, its value and what is expected.
    """
    first, behind = round(begin * count), round(end * count)
    if not 0 <= first < behind <= count:
        raise ValueError(
            f"min_timestep_boundary, max_timestep_boundary: {begin:g} and {end:g} leave no timestep of {count}; "
            "expected 0 <= min < max <= 1"
        )
    if scheme == "logit-normal" and logit_std <= 0:
        raise ValueError(f"logit_std: {logit_std:g} is not above 0")
    if scheme == "mode" and not -1 <= mode_scale <= LARGEST_MODE_SCALE:
        raise ValueError(f"mode_scale: {mode_scale:g} is not from -1 to {LARGEST_MODE_SCALE:.4f}")
    below = _distribution(scheme, np.arange(count, -1, -1) / count, logit_mean, logit_std, mode_scale)
    density = below[:-1] - below[1:]
    density[:first] = density[behind:] = 0
    if density.sum() == 0:
        raise ValueError(f"min_timestep_boundary, max_timestep_boundary: {scheme} has no weight there")
    return density / density.sum()


def _distribution(scheme, times, logit_mean, logit_std, mode_scale):
    """P(t below `times`) of a density on [0, 1]."""
    if scheme == "uniform":
        return times
    if scheme == "logit-normal":
        logits = np.log(times[1:-1]) - np.log1p(-times[1:-1])
        inner = [0.5 * (1 + math.erf((logit - logit_mean) / (logit_std * math.sqrt(2)))) for logit in logits]
        return np.array([1.0, *inner, 0.0])
    if scheme == "mode":
        u = np.linspace(0, 1, GRID + 1)
        reached = 1 - u - mode_scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u)  # falls from 1 to 0
        return np.interp(times, reached[::-1], 1 - u[::-1])
    raise ValueError(f"density {scheme!r} is none of uniform, logit-normal, mode")


def bell_weights(timesteps: np.ndarray, count: int) -> np.ndarray:
    """Loss weights that are largest in the middle, zero at the farther end, and have mean 1. [T] -> [T].

    y = exp(-2 · ((σT - T/2) / T)²), less its smallest value, divided by its mean (DiffSynth-Studio, the flow matching
    scheduler that its guide to supervised training uses).

    Args:
        timesteps: σ · T of the whole table.
        count: T.
    """
    bell = np.exp(-2 * ((timesteps - count / 2) / count) ** 2)
    bell = bell - bell.min()
    return bell / bell.mean()
