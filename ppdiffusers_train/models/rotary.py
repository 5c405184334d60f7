"""Rotary position embeddings: queries and keys are turned by angles that grow with their position (Su et al. 2021,
arXiv 2104.09864)."""

import numpy as np
import paddle

VERSION = 1  # raised when its functions change encoded samples


def inverse_frequencies(size: int, theta: float) -> np.ndarray:
    """θ^(-2i / size), i = 0, …: angle per position of each pair of channels. float32 [size / 2]."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return np.float32(1) / (float(theta) ** exponents.astype(np.float64)).astype(np.float32)


def angles(positions, size: int, theta: float) -> np.ndarray:
    """Positions [L] -> the angle of each pair of channels, float32 [L, size / 2]."""
    return np.asarray(positions, np.float32)[:, None] * inverse_frequencies(size, theta)


def cos_sin(turned: np.ndarray) -> tuple:
    """Angles [L, D / 2] -> their cosines and sines as tensors [L, D / 2], float32."""
    return paddle.to_tensor(np.cos(turned)), paddle.to_tensor(np.sin(turned))


def rotate_pairs(x, cos, sin):
    """Turn neighbouring channels (2i, 2i + 1). x [B, L, heads, D], cos and sin [L, D / 2]. Computes in float32."""
    pairs = x.astype("float32").reshape([*x.shape[:-1], -1, 2])
    return _turned(pairs[..., 0], pairs[..., 1], cos, sin, -1).reshape(x.shape).astype(x.dtype)


def rotate_halves(x, cos, sin):
    """Turn channels (i, i + D / 2), in which order many language models have them. Otherwise as `rotate_pairs`."""
    halves = x.astype("float32").reshape([*x.shape[:-1], 2, -1])
    return _turned(halves[..., 0, :], halves[..., 1, :], cos, sin, -2).reshape(x.shape).astype(x.dtype)


def _turned(first, second, cos, sin, axis):
    cos, sin = cos.unsqueeze([0, 2]), sin.unsqueeze([0, 2])
    return paddle.stack([first * cos - second * sin, first * sin + second * cos], axis=axis)
