"""Low-rank algebra of LoRA updates: their matrix, norm, other ranks, and the best update of a rank for a difference.

By Eckart and Young (1936), the sum of the r largest terms of the singular value decomposition is the best approximation
of rank r in the Frobenius norm; its error is the root of the sum of the squares of the other singular values.
"""

import functools

import numpy as np

from ppdiffusers_train.models.lora_files import Update, padded
from ppdiffusers_train.tensor_files import Computed


def matrix_of(update: Update) -> np.ndarray:
    """(α / r) · B A as float32 [out, in · kh · kw]."""
    down, up = flat(update)
    return np.float32(update.scale) * (up @ down)


def flat(update: Update, dtype=np.float32) -> tuple:
    """A [r, in · kh · kw] and B [out, r]."""
    down, up = update.down.astype(dtype), update.up.astype(dtype)
    return down.reshape(len(down), -1), up.reshape(len(up), -1)


def norm_of(update: Update) -> float:
    """Frobenius norm of (α / r) · B A, by products of the size of the rank."""
    down, up = flat(update, np.float64)
    return abs(update.scale) * float(np.sqrt(max(np.vdot(up.T @ up, down @ down.T), 0.0)))


def low_rank(matrix: np.ndarray, rank: int) -> tuple:
    """The best approximation of a matrix [out, in] by a product.

    Returns:
        A [r, in], whose rows are orthonormal; B [out, r]; the Frobenius norm of the error; r is `rank`, or the smaller
        side of the matrix.
    """
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return right[:rank], left[:, :rank] * values[:rank], float(np.linalg.norm(values[rank:]))


def resized(update: Update, rank: int) -> tuple:
    """An update with another rank, and the share of its norm that is lost, 0 to 1.

    A larger rank changes nothing. A smaller one gives the best approximation of that rank, in float32, with α = r.
    """
    if rank >= update.rank:
        return padded(update, rank), 0.0
    down, up = flat(update, np.float64)
    # The decomposition of B A, which is large, follows from that of a matrix of the size of the rank.
    (left, small_up), (right, small_down) = np.linalg.qr(up), np.linalg.qr(down.T)
    rows, columns, error = low_rank(update.scale * small_up @ small_down.T, rank)
    kernel, whole = update.stored_down.shape[1:], norm_of(update)
    down = (rows @ right.T).astype(np.float32).reshape(len(rows), *kernel)
    up = (left @ columns).astype(np.float32)
    found = Update(down, up[:, :, None, None] if len(kernel) == 3 else up)
    return padded(found, rank), error / whole if whole else 0.0  # a layer may be smaller than the rank


def computed_later(down_shape, up_shape, dtype, compute, alpha=None) -> Update:
    """An update whose matrices `compute` returns when they are used; only those of one layer are kept at a time."""
    parts = ((down_shape, 0), (up_shape, 1))
    return Update(*(Computed(dtype, shape, lambda i=i: latest(compute)[i]) for shape, i in parts), alpha)


@functools.lru_cache(maxsize=1)
def latest(compute):
    """The result of the function that was called last: A and B of a layer are written one after the other."""
    return compute()
