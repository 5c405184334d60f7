"""Noise of several resolutions for one sample: NumPy functions of its random numbers alone."""

import numpy as np


def coarse_noise(draws, shape, discount: float, iterations: int):
    """What multi-resolution noise adds to noise of `shape` [C, H, W]: the sum of coarser and coarser noise, float32.

    Level i, from 0 to `iterations` - 1, is standard normal noise of size H / r^i x W / r^i, enlarged to H x W and
    multiplied by discount^i; r is drawn for each level, uniform in [2, 4). The level whose shorter side is 1 is the
    last. Whitaker 2023, "Multi-resolution noise for diffusion model training", with the sizes of kohya's trainer.

    Args:
        draws: the sample's `RowDraws`.
    """
    channels, height, width = shape
    noise = np.zeros(shape, np.float32)
    for level in range(iterations):
        shrink = float(draws.uniform(f"multires_ratio_{level}", 2.0, 4.0)) ** level
        rows, columns = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = draws.normal(f"multires_noise_{level}", (channels, rows, columns))
        noise += np.float32(discount**level) * enlarge(coarse, height, width)
        if 1 in (rows, columns):
            break
    return noise


def enlarge(array, height: int, width: int):
    """Bilinear interpolation [C, h, w] -> [C, height, width]; the outer borders of the pixels coincide."""
    return linear_weights(array.shape[1], height) @ array @ linear_weights(array.shape[2], width).T


def linear_weights(size: int, enlarged: int):
    """The matrix [enlarged, size] that interpolates a row of pixels linearly."""
    centres = np.clip((np.arange(enlarged) + 0.5) * size / enlarged - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(size))).astype(np.float32)
