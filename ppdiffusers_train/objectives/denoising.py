"""What all denoising jobs share: the noise that is added, and the loss of the prediction."""

from ppdiffusers_train.objectives.losses import mse_loss
from ppdiffusers_train.objectives.noise_schedule import (
    min_snr_weights,
    offset_noise,
    signal_to_noise_ratio,
    training_target,
)


def draw_noise(draws, shape, offset_strength: float = 0.0):
    """Noise [B, *shape] for samples of `shape` [C, H, W], plus offset noise where `offset_strength` is not 0."""
    noise = draws.normal("noise", shape)
    if not offset_strength:
        return noise
    return offset_noise(noise, draws.normal("noise_offset", [shape[0], 1, 1]), offset_strength)


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
