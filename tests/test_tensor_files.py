"""Safetensors in every type."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.tensor_files import (
    DTYPES,
    cast_files,
    open_tensors,
    read_tensors,
    write_parts,
    write_tensors,
)

pytestmark = pytest.mark.once  # no Paddle in it


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_arrays_keep_type_shape_and_bits(tmp_path, dtype):
    array = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    write_tensors(tmp_path / "a.safetensors", {"a": array, "t": array.T}, {"format": "pt"})
    arrays, metadata = read_tensors(tmp_path / "a.safetensors")
    assert arrays["a"].dtype == array.dtype and np.array_equal(arrays["a"], array)
    assert np.array_equal(arrays["t"], array.T) and metadata == {"format": "pt"}


def test_files_are_those_of_the_library(tmp_path):
    """Types of all sizes in one file, a scalar and an empty tensor: written here and read there, and the reverse."""
    arrays = {
        "flag": np.array([True, False, True]),
        "scalar": np.full((), 3.5, "float32"),
        "empty": np.zeros((0, 3), "int64"),
        "halves": np.arange(5, dtype="float16"),
        "é": np.arange(4, dtype="float64"),
        "bytes": np.arange(7, dtype="uint8"),
    }
    write_tensors(tmp_path / "ours.safetensors", arrays, {})
    save_file(arrays, tmp_path / "theirs.safetensors")
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in open_tensors(ours)[0].values())
    for found in (load_file(ours), read_tensors(theirs)[0], read_tensors(ours)[0]):
        assert found.keys() == arrays.keys()
        assert all(found[n].dtype == a.dtype and np.array_equal(found[n], a) for n, a in arrays.items())
        assert all(found[n].shape == a.shape for n, a in arrays.items())


def test_bfloat16_rounds_to_the_nearest_even():
    """8 bits of mantissa: 1 + 1/256 lies between 1 and 1 + 1/128 and rounds to the even one."""
    values = np.float32([1 + 1 / 256, 1 + 3 / 256, 1021.0]).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert values.tolist() == [1.0, 1 + 4 / 256, 1020.0]


def test_other_types_are_refused_by_name(tmp_path):
    save_file({"a": np.zeros(3, "uint64")}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds tensors of type 'U64'"):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_that_was_cut_short_is_named(tmp_path, kept):
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": np.zeros(300, "float32")}, {})
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be read as safetensors"):
        read_tensors(file)


class Device:
    """A tensor that records when it is fetched. Its dtype is written as in Paddle."""

    def __init__(self, array, fetched):
        self.array, self.fetched, self.shape = array, fetched, list(array.shape)
        self.dtype = f"paddle.{array.dtype}"

    def numpy(self):
        self.fetched.append(self)
        return self.array.copy()


def stored(folder, stem="stem"):
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    return {name: tensor for file in files for name, tensor in open_tensors(file)[0].items()}


def numbers(count, size=1000):
    return {f"t{i}": np.arange(i, i + size, dtype="float32") for i in range(count)}


@pytest.mark.parametrize("limit, files", [(2**30, 1), (8000, 3), (11999, 3), (12000, 2), (100, 5)])
def test_parts_hold_at_most_the_limit_or_one_tensor(tmp_path, limit, files):
    arrays, fetched = numbers(5), []
    write_parts(tmp_path, "stem", ((name, Device(array, fetched)) for name, array in arrays.items()), limit)
    names = (
        [f"stem-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)] if files > 1 else ["stem.safetensors"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(path.stat().st_size < max(limit, 4000) + 1000 for path in tmp_path.iterdir())
    found = stored(tmp_path)
    assert list(found) == list(arrays) and all(np.array_equal(found[n].numpy(), a) for n, a in arrays.items())
    assert len(fetched) == 5


def test_the_host_holds_one_tensor_of_those_that_it_writes_and_reads(tmp_path):
    size = 250_000  # 1 MB
    arrays = numbers(20, size)
    tensors = [(name, Device(array, [])) for name, array in arrays.items()]
    tracemalloc.start()
    try:
        write_parts(tmp_path, "stem", tensors, limit=8 * 4 * size)
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        assert all(tensor.numpy()[3] == arrays[name][3] for name, tensor in stored(tmp_path).items())
        read = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert 4 * size < written < 2.5 * 4 * size  # the tensor being written, and the one fetched next
    assert 4 * size < read < 2.5 * 4 * size


def test_a_set_may_be_empty(tmp_path):
    assert write_parts(tmp_path, "stem", []) == {"stem.safetensors": []}
    assert not stored(tmp_path)


def test_files_have_the_usual_permissions(tmp_path):
    """Those of the library's writer, in its version 0.8, are for their owner alone."""
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a.safetensors", numbers(1), {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    class Unreadable(Device):
        def numpy(self):
            raise OSError(28, "No space left on device")

    write_tensors(tmp_path / "a.safetensors", numbers(1), {})
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "a.safetensors", {"x": Unreadable(np.zeros(3), [])}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert read_tensors(tmp_path / "a.safetensors")[0].keys() == {"t0"}


def test_nothing_of_an_earlier_set_is_left(tmp_path):
    write_parts(tmp_path, "other", numbers(1).items())
    for limit, files in ((8000, 3), (2**30, 1), (4000, 5), (12000, 2)):
        write_parts(tmp_path, "stem", numbers(5).items(), limit)
        assert len(list(tmp_path.glob("stem*"))) == files and len(stored(tmp_path)) == 5
    assert stored(tmp_path, "other").keys() == {"t0"}


def test_a_tensor_too_large_for_float16_stays_as_it_is_and_is_named(tmp_path, capsys):
    write_tensors(tmp_path / "a.safetensors", {"large": np.float32([1e5, 1]), "small": np.float32([6e4])}, {})
    cast_files(tmp_path, "float16")
    arrays = read_tensors(tmp_path / "a.safetensors")[0]
    assert arrays["large"].tolist() == [1e5, 1] and {name: a.dtype.name for name, a in arrays.items()} == {
        "large": "float32",
        "small": "float16",
    }
    assert "large has values too large for it and stays float32" in capsys.readouterr().out


def test_cast_files_leaves_integers_and_what_others_see_of_the_file(tmp_path):
    arrays = {"a": np.float32([1 / 3, 2]), "whole": np.arange(3)}
    write_tensors(tmp_path / "base.safetensors", arrays, {"format": "pd"})
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "a.safetensors").hardlink_to(tmp_path / "base.safetensors")
    cast_files(tmp_path / "result", "bfloat16")
    cast, metadata = read_tensors(tmp_path / "result" / "a.safetensors")
    assert cast["a"].dtype == ml_dtypes.bfloat16 and np.array_equal(cast["a"], arrays["a"].astype(ml_dtypes.bfloat16))
    assert cast["whole"].dtype == np.int64 and metadata == {"format": "pd"}
    assert np.array_equal(read_tensors(tmp_path / "base.safetensors")[0]["a"], arrays["a"])
