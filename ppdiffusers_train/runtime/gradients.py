"""Scaling gradients by factors that stay on the device."""

from math import inf

import paddle


@paddle.no_grad()
def clipping_factor(norm, max_norm: float, factor: float = 1.0):
    """The factor that scales gradients by `factor` and clips the result to `max_norm` (Pascanu et al. 2013, arXiv
    1211.5063, algorithm 1): `factor`, or less.

    Computed in float64; `scale_gradients` rounds it once.

    Args:
        norm: of the gradients, a float32 scalar on the device.
    """
    scaled = norm.astype("float64") * factor
    return paddle.where(scaled > max_norm, factor * (max_norm / scaled), paddle.full_like(scaled, factor))


@paddle.no_grad()
def scale_gradients(gradients: list, factor) -> None:
    """Multiply gradients in place by a scalar on the device."""
    factor = factor.astype("float32")
    for gradient in gradients:
        gradient.multiply_(factor)


@paddle.no_grad()
def clip_and_scale(gradients: list, norm, factor: float, loss_scale: float, max_norm: float, max_each=None) -> None:
    """Multiply gradients in place by `factor / loss_scale`, and clip the results.

    Args:
        norm: of all gradients, without the loss scale: a float32 scalar on the device.
        max_norm: of all results together; 0 does not clip.
        max_each: of each of them; None does not clip.
    """
    if not max_each:
        scale_gradients(gradients, clipping_factor(norm, max_norm or inf, factor) / loss_scale)
        return
    for gradient in gradients:
        flat = gradient.flatten()
        own = paddle.matmul(flat, flat).sqrt() / loss_scale
        scale_gradients([gradient], clipping_factor(own, max_each, factor) / loss_scale)
