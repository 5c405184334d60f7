"""Gradients summed over micro-batches by one process; tests/distributed sums them over ranks, too."""

import ppdiffusers_train  # noqa: F401

import gc
import weakref

import numpy as np
import paddle
import pytest

from ppdiffusers_train.runtime.distributed import Ranks
from ppdiffusers_train.runtime.gradient_sums import GradientSums


def parameter(dtype):
    return paddle.nn.Linear(1, 3).to(dtype=dtype).bias


def backward(weights, gradient):
    (weights.astype("float32") * paddle.to_tensor(gradient)).sum().backward()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_micro_batches_add_up_in_float32(dtype):
    used, unused = parameter(dtype), parameter(dtype)
    sums = GradientSums({"used": used, "unused": unused}, Ranks(0, 1))
    gradients = [[1024.0, 1.0, -3.0], [0.25, 0.0078125, 2.0], [0.25, 0.0078125, 1.0]]  # lost in 16 bits
    for _ in range(2):
        for i, numbers in enumerate(gradients):
            with sums.micro_batch(last=i == 2):
                backward(used, numbers)
        assert not sums.send_rest()
        sums.finish(False)
        expected = np.asarray(gradients, "float32").sum(0)
        assert used.grad.dtype == paddle.float32 and used.grad.tolist() == expected.tolist()
        assert unused.grad is None
        assert float(sums.squared_norm()) == pytest.approx((expected.astype("float64") ** 2).sum())
        used.clear_gradient(False)
    assert float(sums.squared_norm()) == 0


def test_the_sum_in_a_low_type_would_be_another():
    """Paddle adds up in the type of the parameter: when this fails, Paddle's own sums can take over."""
    low = parameter("bfloat16")
    for numbers in ([256.0] * 3, [1.0] * 3):
        backward(low, numbers)
    assert low.grad.astype("float32").tolist() == [256] * 3


def test_a_gradient_that_a_layer_has_none_for_is_none():
    class Half(paddle.autograd.PyLayer):
        @staticmethod
        def forward(ctx, x, y):
            return x.astype("float32") * 2 + y.astype("float32")

        @staticmethod
        def backward(ctx, gradient):
            return gradient.astype("bfloat16"), None

    one, other = parameter("bfloat16"), parameter("bfloat16")
    sums = GradientSums({"one": one, "other": other}, Ranks(0, 1))
    with sums.micro_batch(last=True):
        Half.apply(one, other).sum().backward()
    sums.finish(False)
    assert one.grad.tolist() == [1, 1, 1] and other.grad is None


def test_parameters_do_not_keep_the_sums_alive():
    kept = parameter("float16")
    sums = weakref.ref(GradientSums({"kept": kept}, Ranks(0, 1)))
    gc.collect()
    assert sums() is None
    backward(kept, [1.0] * 3)
    assert kept.grad.dtype == paddle.float16
