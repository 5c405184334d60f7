"""Safetensors in every type."""

import ml_dtypes
import numpy as np
import pytest

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.tensor_files import first_dtype, read_tensors, write_tensors

pytestmark = pytest.mark.once  # no Paddle in it


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16, "int64", "int32"])
def test_arrays_keep_type_shape_and_bits(tmp_path, dtype):
    array = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    write_tensors(tmp_path / "a.safetensors", {"a": array, "t": array.T}, {"format": "pt"})
    arrays, metadata = read_tensors(tmp_path / "a.safetensors")
    assert arrays["a"].dtype == array.dtype and np.array_equal(arrays["a"], array)
    assert np.array_equal(arrays["t"], array.T) and metadata == {"format": "pt"}
    assert first_dtype(tmp_path / "a.safetensors") == array.dtype


def test_bfloat16_rounds_to_the_nearest_even():
    """8 bits of mantissa: 1 + 1/256 lies between 1 and 1 + 1/128 and rounds to the even one."""
    values = np.float32([1 + 1 / 256, 1 + 3 / 256, 1021.0]).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert values.tolist() == [1.0, 1 + 4 / 256, 1020.0]


def test_other_types_are_refused_by_name(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(3, bool)}, {})
    with pytest.raises(UserError, match="holds tensors of type 'BOOL'"):
        read_tensors(tmp_path / "a.safetensors")
