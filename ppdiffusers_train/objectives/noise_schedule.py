"""The forward process of a discrete-time diffusion model, as pure functions of its table of cumulative alphas.

Throughout, `alphas_cumprod` [T] float32 holds ᾱ_t, the product of (1 - β_s) up to t (Ho et al. 2020, arXiv 2006.11239,
section 2), and `timesteps` [B] int64 indexes it. Per-sample coefficients are broadcast over all other axes of a sample.
"""

import paddle


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
