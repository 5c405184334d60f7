"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378), as pure functions.

Throughout, `alphas_cumprod` [T] float32 holds ᾱ_t, and α_t = √ᾱ_t, σ_t = √(1 - ᾱ_t); `timesteps` [B] int64.
"""

import math

import numpy as np
import paddle

from ppdiffusers_train.objectives.noise_schedule import per_sample

SIGMA_DATA = 0.5


def boundary_scalings(timesteps, timestep_scaling: float) -> tuple:
    """c_skip(t) = σ² / ((s·t)² + σ²) and c_out(t) = s·t / √((s·t)² + σ²), with σ = 0.5. [B] -> [B], [B].

    With them f(x, t) = c_skip · x + c_out · x̂_0 equals x at t = 0 (Song et al. 2023, arXiv 2303.01469, section 3
    and appendix C). The larger s, the faster f departs from x as t grows.
    """
    scaled = timesteps.astype("float32") * timestep_scaling
    squares = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / squares, scaled / squares.sqrt()


def consistency_function(noisy, predicted_sample, timesteps, timestep_scaling: float):
    """f(x, t) = c_skip(t) · x + c_out(t) · x̂_0 (eq. 9). `noisy`, `predicted_sample` [B, …] -> [B, …]."""
    skip, out = (per_sample(scale, noisy) for scale in boundary_scalings(timesteps, timestep_scaling))
    return skip * noisy + out * predicted_sample


def consistency_output(prediction_type: str, alphas_cumprod, prediction, noisy, timesteps, timestep_scaling: float):
    """f(x, t) from a model's prediction for `noisy` [B, …], computed in float32."""
    sample, _ = sample_and_noise(prediction_type, alphas_cumprod, prediction.astype("float32"), noisy, timesteps)
    return consistency_function(noisy, sample, timesteps, timestep_scaling)


def sample_and_noise(prediction_type: str, alphas_cumprod, prediction, noisy, timesteps) -> tuple:
    """The x̂_0 and ε̂ that a model's prediction implies, [B, …] each.

    From x_t = α x_0 + σ ε, and v = α ε - σ x_0.

    Raises:
        ValueError: for a prediction type other than "epsilon", "v_prediction", "sample".
    """
    alpha_bar = per_sample(alphas_cumprod[timesteps], noisy)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / alpha, prediction
    if prediction_type == "v_prediction":
        return alpha * noisy - sigma * prediction, alpha * prediction + sigma * noisy
    if prediction_type == "sample":
        return prediction, (noisy - alpha * prediction) / sigma
    raise ValueError(f"prediction type {prediction_type!r} is none of epsilon, v_prediction, sample")


def apply_guidance(conditional, unconditional, guidance):
    """c + w · (c - u) (eq. 14). Pipelines call w + 1 the guidance scale. [B, …], [B] -> [B, …]."""
    return conditional + per_sample(guidance, conditional) * (conditional - unconditional)


def ddim_timesteps(train_timesteps: int, count: int) -> np.ndarray:
    """The `count` timesteps of the solver, ascending: k·(T // N) - 1 for k = 1 … N. int64 [N].

    Raises:
        ValueError: there are fewer than `count`.
    """
    if count > train_timesteps:
        raise ValueError(f"num_ddim_timesteps: {count} is more than the {train_timesteps} timesteps of the teacher")
    return np.arange(1, count + 1, dtype=np.int64) * (train_timesteps // count) - 1


def step_before(steps, index):
    """`steps[index - 1]`, and 0 before the first: [N], [B] -> [B] int64."""
    return paddle.concat([paddle.zeros([1], "int64"), steps[:-1]])[index]


def ddim_step(alphas_cumprod, steps, index, predicted_sample, predicted_noise):
    """From timestep `steps[index]` to the solver's previous one: √ᾱ_s x̂_0 + √(1 - ᾱ_s) ε̂ (Song et al. 2020, arXiv
    2010.02502, eq. 12 with σ = 0), where s is that of `step_before`.

    Args:
        steps: tensor [N] int64 of `ddim_timesteps`.
        index: tensor [B] int64 of indices into `steps`.
    """
    alpha_bar = per_sample(alphas_cumprod[step_before(steps, index)], predicted_sample)
    return alpha_bar.sqrt() * predicted_sample + (1 - alpha_bar).sqrt() * predicted_noise


def guided_ddim_step(prediction_type: str, alphas_cumprod, steps, index, noisy, conditional, unconditional, guidance):
    """The teacher's step under guidance: `noisy` [B, …] at timesteps `steps[index]` -> the solver's previous sample.

    Args:
        conditional, unconditional: the teacher's predictions for `noisy` with a caption and without, converted to
            float32.
        guidance: w [B] of `apply_guidance`.
    """
    predictions = (prediction.astype("float32") for prediction in (conditional, unconditional))
    (sample, noise), (empty_sample, empty_noise) = (
        sample_and_noise(prediction_type, alphas_cumprod, prediction, noisy, steps[index]) for prediction in predictions
    )
    sample, noise = apply_guidance(sample, empty_sample, guidance), apply_guidance(noise, empty_noise, guidance)
    return ddim_step(alphas_cumprod, steps, index, sample, noise)


def guidance_embedding(guidance, dimensions: int):
    """The embedding of a student's guidance scale: [B] -> [B, dimensions], sines before cosines of 1000·w at geometric
    frequencies from 1 to 1/10000 (the timestep embedding of Vaswani et al. 2017, arXiv 1706.03762, section 3.5).

    If the number of dimensions is odd, the last element is zero.
    """
    half = dimensions // 2
    frequencies = paddle.exp(paddle.arange(half, dtype="float32") * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * guidance.astype("float32").unsqueeze(1) * frequencies.unsqueeze(0)
    odd = paddle.zeros([len(guidance), dimensions % 2])
    return paddle.concat([angles.sin(), angles.cos(), odd], axis=1)
