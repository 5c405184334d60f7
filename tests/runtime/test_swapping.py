"""Tensors that are swapped out take no memory, and have the same bits afterwards."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest

from ppdiffusers_train.errors import WriteError
from ppdiffusers_train.loop.memory_estimate import allocated
from ppdiffusers_train.runtime.precision import same_storage
from ppdiffusers_train.runtime.swapping import swapped_out


def some_tensors() -> list:
    layer = paddle.nn.Linear(3, 1000)
    sharing = same_storage(layer.weight)
    others = [paddle.arange(5000).astype(dtype) for dtype in ("bfloat16", "int8", "uint8", "int64")]
    return [layer.weight, sharing, layer.bias, *others, paddle.empty([0])]


def test_tensors_have_the_same_bits_afterwards_and_take_no_memory_meanwhile(tmp_path):
    before, tensors = allocated(), some_tensors()
    values, taken = [tensor.numpy().copy() for tensor in tensors], allocated() - before
    with swapped_out(tensors, tmp_path):
        assert allocated() - before == 0 < taken, "and the file has no name"
        assert not list(tmp_path.iterdir())
        with pytest.raises(Exception, match="(?i)initialized|holder|memory"):
            tensors[0] + 1
    for tensor, value in zip(tensors, values):
        assert np.array_equal(tensor.numpy(), value) and tensor.numpy().dtype == value.dtype
    assert allocated() - before == taken, "what shared its storage shares it again"
    tensors[0].set_value(tensors[0] * 2)
    assert np.array_equal(tensors[1].numpy(), 2 * values[1])
    paddle.nn.functional.linear(paddle.ones([1, 3]), tensors[0]).sum().backward()
    assert tensors[0].grad is not None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(WriteError, match="not needed while samples are encoded.*no-such-folder"):
        with swapped_out(some_tensors(), tmp_path / "no-such-folder"):
            pass
