"""Losses as pure functions. A loss is a mean over the samples of a batch, so batches of any size can be averaged."""


def area_weights(mask, outside: float):
    """The weight map of a masked loss, `outside + (1 - outside) · mask`, or None without a mask.

    It multiplies the error of each element, and the mean is still taken over all of them: within the mask the gradient
    is that of a loss without one, whatever the size of the area, and outside it is `outside` times that, exactly zero
    for 0.

    Args:
        mask: [B, 1, h, w] from 0 to 1, or None.
    """
    return None if mask is None else outside + (1 - outside) * mask


def mse_loss(prediction, target, weights=None, area=None):
    """mean_i( w_i · mean(area_i · (prediction_i - target_i)²) ), in float32.

    Args:
        prediction, target: [B, …] of one shape and any floating type.
        weights: [B] float32, one per sample; `None` for equal weights.
        area: of `area_weights`, broadcast over the channels; `None` for equal weights.
    Returns:
        A scalar.
    """
    return weighted_mean(difference(prediction, target).square(), weights, area)


def pseudo_huber_loss(prediction, target, c: float):
    """mean_i( mean( √((prediction_i - target_i)² + c²) - c ) ), in float32: quadratic within c, linear beyond.

    Charbonnier et al. 1994; Song & Dhariwal 2023, arXiv 2310.14189, section 3.3, with one root per element instead of
    one per sample, as latent consistency models are trained. [B, …] -> a scalar.
    """
    return weighted_mean(charbonnier(difference(prediction, target), c))


def huber_loss(prediction, target, c, is_smooth_l1: bool, weights=None, area=None):
    """The same with a c for each sample [B] and the factor 2c, with which it is (prediction - target)² far below c; or,
    for smooth L1, the factor 2, with which it is 2 |prediction - target| far above c.

    Khrapov et al. 2024, "Improving diffusion models's data-corruption resistance using scheduled pseudo-Huber loss",
    arXiv 2403.16728; the two factors are those of diffusers' and kohya's trainers. [B, …] -> a scalar.
    """
    error = difference(prediction, target)
    c = c.reshape([-1] + [1] * (error.ndim - 1))
    return weighted_mean((2 if is_smooth_l1 else 2 * c) * charbonnier(error, c), weights, area)


def charbonnier(error, c):
    """√(error² + c²) - c of each element."""
    return (error.square() + c * c).sqrt() - c


def difference(prediction, target):
    """prediction - target in float32."""
    return prediction.astype("float32") - target.astype("float32")


def weighted_mean(errors, weights=None, area=None):
    """mean_i( w_i · mean(area_i · errors_i) ) of errors [B, …], weights [B] and a weight map that is broadcast."""
    per_sample = (errors if area is None else errors * area).flatten(1).mean(1)
    return (per_sample if weights is None else per_sample * weights).mean()
