"""The forward process of a discrete-time diffusion model, as pure functions of its table of cumulative alphas.

Throughout, `alphas_cumprod` [T] float32 holds ᾱ_t, the product of (1 - β_s) up to t (Ho et al. 2020, arXiv 2006.11239,
section 2), and `timesteps` [B] int64 indexes it. Per-sample coefficients are broadcast over all other axes of a sample.
"""

import math

import paddle

HIGHEST_SNR = 1000.0  # the limit of kohya's trainer, for weights that grow or vanish without noise


def per_sample(values, like):
    """Coefficients [B] -> [B, 1, …, 1], with as many axes as `like`."""
    return values.reshape([-1] + [1] * (like.ndim - 1))


def add_noise(alphas_cumprod, sample, noise, timesteps):
    """x_t = √ᾱ_t · x_0 + √(1 - ᾱ_t) · ε  (Ho et al. 2020, eq. 4). `sample`, `noise`: [B, …] -> [B, …]."""
    alpha = per_sample(alphas_cumprod[timesteps], sample)
    return alpha.sqrt() * sample + (1 - alpha).sqrt() * noise


def velocity(alphas_cumprod, sample, noise, timesteps):
    """v_t = √ᾱ_t · ε - √(1 - ᾱ_t) · x_0  (Salimans & Ho 2022, arXiv 2202.00512, appendix D). [B, …] -> [B, …]."""
    alpha = per_sample(alphas_cumprod[timesteps], sample)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * sample


def signal_to_noise_ratio(alphas_cumprod, timesteps):
    """SNR(t) = ᾱ_t / (1 - ᾱ_t)  (Kingma et al. 2021, arXiv 2107.00630, eq. 1). [B] -> [B]."""
    alpha = alphas_cumprod[timesteps]
    return alpha / (1 - alpha)


def training_target(prediction_type, alphas_cumprod, sample, noise, timesteps):
    """What a model of this `prediction_type` ("epsilon", "v_prediction" or "sample") has to predict. [B, …] -> [B, …].

    Raises:
        ValueError: for any other prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return velocity(alphas_cumprod, sample, noise, timesteps)
    if prediction_type == "sample":
        return sample
    raise ValueError(f"prediction type {prediction_type!r} is none of epsilon, v_prediction, sample")


def offset_noise(noise, offset_per_channel, strength: float):
    """ε + strength · o: noise whose mean varies by sample and channel, as overall brightness does in images.

    `noise` [B, C, H, W], `offset_per_channel` [B, C, 1, 1] standard normal (Guttenberg 2023, "Diffusion with offset
    noise", www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    return noise + strength * offset_per_channel


def debiased_weights(snr, prediction_type: str):
    """Loss weights 1 / √SNR for epsilon (Yu et al. 2023, arXiv 2310.08442, eq. 10). [B] -> [B].

    For sample prediction, whose squared error times SNR is that of epsilon, √SNR; for v_prediction 1 / (SNR + 1), as
    kohya's trainer has it, which weights the error of the sample by 1. SNR counts as at most `HIGHEST_SNR`.
    """
    snr = paddle.clip(snr, max=HIGHEST_SNR)
    if prediction_type == "epsilon":
        return 1 / snr.sqrt()
    return 1 / (snr + 1) if prediction_type == "v_prediction" else snr.sqrt()


def epsilon_like_weights(snr):
    """SNR / (SNR + 1): the squared error of v times this is that of epsilon. [B] -> [B]. SNR is limited as above."""
    snr = paddle.clip(snr, max=HIGHEST_SNR)
    return snr / (snr + 1)


def huber_thresholds(schedule: str, c: float, alphas_cumprod, timesteps):
    """Where the Huber loss turns from quadratic to linear, at each timestep. [B] -> [B] float32.

    "constant": c. "exponential": c^(t / T), from 1 at t = 0. "snr": c + (1 - c) / (1 + σ_t)² with the noise σ_t = √(1 /
    SNR), from 1 without noise to c (Khrapov et al. 2024, arXiv 2403.16728, section 3.3).

    Raises:
        ValueError: for any other schedule.
    """
    if schedule == "constant":
        return paddle.full(timesteps.shape, c, "float32")
    if schedule == "exponential":
        return paddle.exp(timesteps.astype("float32") * (math.log(c) / len(alphas_cumprod)))
    if schedule == "snr":
        sigma = 1 / signal_to_noise_ratio(alphas_cumprod, timesteps).sqrt()
        return c + (1 - c) / (1 + sigma).square()
    raise ValueError(f"schedule {schedule!r} is none of constant, exponential, snr")


def min_snr_weights(snr, gamma: float, prediction_type: str):
    """Loss weights that treat timesteps as tasks of equal difficulty. [B] -> [B].

    With m = min(SNR, γ): m / SNR for epsilon, m / (SNR + 1) for v_prediction, m for sample prediction (Hang et al.
    2023, arXiv 2303.09556, section 3.4). The first is computed as min(1, γ / SNR), which is the same value, and at SNR
    0 (a schedule with zero terminal SNR) is the limit 1 instead of 0/0.
    """
    if prediction_type == "epsilon":
        return paddle.clip(gamma / snr, max=1.0)
    if prediction_type == "v_prediction":
        return paddle.clip(snr, max=gamma) / (snr + 1)
    if prediction_type == "sample":
        return paddle.clip(snr, max=gamma)
    raise ValueError(f"prediction type {prediction_type!r} is none of epsilon, v_prediction, sample")
