"""What all denoising jobs share: the noise that is added, and the loss of the prediction."""

from ppdiffusers_train.objectives.losses import mse_loss
from ppdiffusers_train.objectives.noise_schedule import (
    min_snr_weights,
    offset_noise,
    per_sample,
    signal_to_noise_ratio,
    training_target,
)


def draw_noise(draws, shape, offset_strength: float = 0.0):
    """Noise [B, *shape] for samples of `shape` [C, H, W], plus offset noise where `offset_strength` is not 0."""
    noise = draws.normal("noise", shape)
    if not offset_strength:
        return noise
    return offset_noise(noise, draws.normal("noise_offset", [shape[0], 1, 1]), offset_strength)


def perturb_noise(draws, noise, strength: float = 0.0):
    """The noise [B, C, H, W] that a sample gets, where it is to differ from the noise that the target is made of:
    ε + strength · ξ, ξ standard normal (Ning et al. 2023, arXiv 2301.11706, algorithm 1)."""
    return noise + strength * draws.normal("input_perturbation", noise.shape[1:]) if strength else noise


def rectify_noise(alphas_cumprod, noisy, noise, timesteps, prediction, detail_preservation: float):
    """Diffusion rectification and estimation-adaptive models (DREAM; Zhou et al. 2023, arXiv 2312.00210, eq. 8).

    The model's own error, times λ = √(1 - ᾱ_t)^p, is added to the noise in its input and to its target. [B, …] of one
    shape.

    Args:
        noisy: the model's input, in which the noise has the factor √(1 - ᾱ_t).
        noise: its target, epsilon.
        prediction: its output for `noisy`, without gradient.
        detail_preservation: the exponent p.
    Returns:
        (input, target) of the training step.
    """
    deviation = per_sample((1 - alphas_cumprod[timesteps]).sqrt(), noise)
    difference = deviation**detail_preservation * (noise - prediction.astype(noise.dtype))
    return noisy + deviation * difference, noise + difference


def denoising_loss(prediction, prediction_type, alphas_cumprod, sample, noise, timesteps, snr_gamma=None):
    """The mean squared error of a prediction, with min-SNR weights where a γ is given. [B, …] -> a scalar, float32.

    Args:
        prediction: a model's output for `add_noise(alphas_cumprod, sample, noise, timesteps)`.
        snr_gamma: γ of `min_snr_weights`, or None.
    """
    target = training_target(prediction_type, alphas_cumprod, sample, noise, timesteps)
    if snr_gamma is None:
        return mse_loss(prediction, target)
    snr = signal_to_noise_ratio(alphas_cumprod, timesteps)
    return mse_loss(prediction, target, min_snr_weights(snr, snr_gamma, prediction_type))
