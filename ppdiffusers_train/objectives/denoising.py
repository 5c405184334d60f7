"""The two ends of a denoising step, the same for every model: the noise that goes in, and the loss that comes out."""

from ppdiffusers_train.objectives.losses import mse_loss
from ppdiffusers_train.objectives.noise_schedule import (
    min_snr_weights,
    offset_noise,
    signal_to_noise_ratio,
    training_target,
)


def draw_noise(draws, shape, offset_strength: float = 0.0):
    """Noise [B, *shape] for samples of `shape` [C, H, W], with offset noise where it is asked for."""
    noise = draws.normal("noise", shape)
    if not offset_strength:
        return noise
    return offset_noise(noise, draws.normal("noise_offset", [shape[0], 1, 1]), offset_strength)


def denoising_loss(prediction, prediction_type, alphas_cumprod, sample, noise, timesteps, snr_gamma=None):
    """The squared error of a prediction, weighted by min-SNR where a γ is given. [B, …] -> a scalar, float32.

    Args:
        prediction: of a model of this `prediction_type` from `add_noise(alphas_cumprod, sample, noise, timesteps)`.
        snr_gamma: γ of `min_snr_weights`, or None.
    """
    target = training_target(prediction_type, alphas_cumprod, sample, noise, timesteps)
    if snr_gamma is None:
        return mse_loss(prediction, target)
    snr = signal_to_noise_ratio(alphas_cumprod, timesteps)
    return mse_loss(prediction, target, min_snr_weights(snr, snr_gamma, prediction_type))
