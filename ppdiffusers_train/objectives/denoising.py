"""What all denoising jobs share: the noise that is added, and the loss of the prediction."""

from ppdiffusers_train.objectives.losses import huber_loss, mse_loss
from ppdiffusers_train.objectives.multires_noise import coarse_noise
from ppdiffusers_train.objectives.noise_schedule import (
    debiased_weights,
    epsilon_like_weights,
    huber_thresholds,
    min_snr_weights,
    offset_noise,
    per_sample,
    signal_to_noise_ratio,
    training_target,
)

MULTIRES_ITERATIONS, HUBER_C, HUBER_SCHEDULE = 6, 0.1, "snr"  # where a flag does not say it


def draw_noise(draws, shape, offset_strength: float = 0.0, discount: float = 0.0, iterations=None):
    """Noise [B, *shape] for samples of `shape` [C, H, W], plus offset noise where `offset_strength` is not 0, plus
    `coarse_noise` where `discount` is not 0; each sample's noise is then scaled back to a standard deviation of 1."""
    noise = draws.normal("noise", shape)
    if offset_strength:
        noise = offset_noise(noise, draws.normal("noise_offset", [shape[0], 1, 1]), offset_strength)
    if not discount:
        return noise
    levels = MULTIRES_ITERATIONS if iterations is None else iterations
    noise = noise + draws.each(lambda row: coarse_noise(row, shape, discount, levels))
    return noise / per_sample(noise.flatten(1).std(1), noise)


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


def denoising_loss(
    prediction, prediction_type, alphas_cumprod, sample, noise, timesteps, weighting=None, huber=None, area=None
):
    """The squared error or Huber loss of a prediction, weighted by timestep if asked for. [B, …] -> a scalar, float32.

    Args:
        prediction: a model's output for `add_noise(alphas_cumprod, sample, noise, timesteps)`.
        weighting: weights [B] from SNR [B] and prediction type, such as `debiased_weights`; `None` for equal weights.
        huber: (loss type, threshold, its schedule) of `huber_loss` and `huber_thresholds`; `None` for squared errors.
        area: of `losses.area_weights`.
    """
    target = training_target(prediction_type, alphas_cumprod, sample, noise, timesteps)
    snr = signal_to_noise_ratio(alphas_cumprod, timesteps)
    weights = weighting(snr, prediction_type) if weighting else None
    if huber is None:
        return mse_loss(prediction, target, weights, area)
    loss_type, c, schedule = huber
    thresholds = huber_thresholds(schedule, c, alphas_cumprod, timesteps)
    return huber_loss(prediction, target, thresholds, loss_type == "smooth_l1", weights, area)


def snr_weighting(snr_gamma, debiased_loss: bool, scale_v_pred_loss_like_noise_pred: bool, prediction_type: str):
    """The `weighting` of `denoising_loss` that these flags ask for.

    Raises:
        ValueError: they exclude each other, or do not fit the prediction type.
    """
    if debiased_loss and snr_gamma is not None:
        raise ValueError("debiased_loss: both this flag and --snr_gamma weight the loss; expected one of them")
    if not scale_v_pred_loss_like_noise_pred:
        if snr_gamma is None:
            return debiased_weights if debiased_loss else None
        return lambda snr, kind: min_snr_weights(snr, snr_gamma, kind)
    name = "scale_v_pred_loss_like_noise_pred"
    if prediction_type != "v_prediction":
        raise ValueError(f"{name}: this model predicts {prediction_type}; expected one that predicts v_prediction")
    if debiased_loss or snr_gamma is not None:
        other = "--debiased_loss" if debiased_loss else "--snr_gamma"
        raise ValueError(f"{name}: both this flag and {other} weight the loss; expected one of them")
    return lambda snr, kind: epsilon_like_weights(snr)


def huber_settings(loss_type: str, c, schedule) -> tuple | None:
    """The `huber` of `denoising_loss` that these flags ask for; c and schedule may be None.

    Raises:
        ValueError: one of them is given with squared errors.
    """
    given = [name for name, value in (("huber_c", c), ("huber_schedule", schedule)) if value is not None]
    if loss_type == "l2":
        if given:
            raise ValueError(f"{given[0]}: --loss_type is l2, which has no threshold; expected huber or smooth_l1")
        return None
    return loss_type, HUBER_C if c is None else c, HUBER_SCHEDULE if schedule is None else schedule


def check_multires(discount: float, iterations) -> None:
    """Raise a ValueError if a number of levels of coarse noise is given, but no coarse noise."""
    if iterations is not None and not discount:
        raise ValueError("multires_noise_iterations: --multires_noise_discount is 0, so there is no such noise")
