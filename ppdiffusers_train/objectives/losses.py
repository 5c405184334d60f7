"""Losses as pure functions. A loss is a mean over the samples of a batch, so batches of any size can be averaged."""


def mse_loss(prediction, target, weights=None):
    """mean_i( w_i · mean((prediction_i - target_i)²) ), in float32.

    Args:
        prediction, target: [B, …] of one shape and any floating type.
        weights: [B] float32, one per sample; `None` for equal weights.
    Returns:
        A scalar.
    """
    squared_error = (prediction.astype("float32") - target.astype("float32")).square()
    per_sample = squared_error.flatten(1).mean(1)
    return (per_sample if weights is None else per_sample * weights).mean()


def pseudo_huber_loss(prediction, target, c: float):
    """mean_i( mean( √((prediction_i - target_i)² + c²) - c ) ), in float32: quadratic within c, linear beyond.

    Charbonnier et al. 1994; Song & Dhariwal 2023, arXiv 2310.14189, section 3.3, with one root per element instead of
    one per sample, as latent consistency models are trained. [B, …] -> a scalar.
    """
    difference = prediction.astype("float32") - target.astype("float32")
    return ((difference.square() + c * c).sqrt() - c).flatten(1).mean(1).mean()
