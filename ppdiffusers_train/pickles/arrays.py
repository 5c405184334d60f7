"""Arrays in a file, read when they are fetched."""

import math

import ml_dtypes
import numpy as np

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.pickles.machine import Bytes, RefusedPickle

# What files of weights hold. Paddle's pickles keep bfloat16 as uint16, a type that its tensors do not have.
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NUMPY_TYPES = {
    "f8": np.dtype("float64"), "f4": np.dtype("float32"), "f2": np.dtype("float16"), "u2": BFLOAT16,
    "i8": np.dtype("int64"), "i4": np.dtype("int32"), "i2": np.dtype("int16"), "i1": np.dtype("int8"),
    "u1": np.dtype("uint8"), "b1": np.dtype("bool"),
}  # fmt: skip
TORCH_TYPES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "u2", "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "b1",
}  # fmt: skip


# The types that torch's newer files name beside storages of plain bytes.
TORCH_NAMES = {
    "float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "u2", "int64": "i8", "int32": "i4", "int16": "i2",
    "int8": "i1", "uint8": "u1", "bool": "b1",
}  # fmt: skip


class Type:
    """A number's type, as NumPy pickles it."""

    def __init__(self, code):
        if code not in NUMPY_TYPES:
            raise RefusedPickle(f"it holds an array of type {code!r:.40}; expected one of {', '.join(NUMPY_TYPES)}")
        self.dtype = NUMPY_TYPES[code]

    def set_state(self, state) -> None:
        """Take what follows a type: the order of bytes, and what only records have."""
        if type(state) is not tuple or len(state) < 8 or state[1] not in ("<", "|") or any(state[2:5]):
            raise RefusedPickle("it holds an array of records or of another order of bytes; expected plain numbers")


def sizes_of(sizes) -> list:
    """Sizes, or steps, that a pickle gives. A `RefusedPickle` if they are none, or no array has such."""
    sizes = (sizes,) if type(sizes) is int else sizes
    are_sizes = type(sizes) in (tuple, list) and len(sizes) <= 32 and all(type(n) is int and n >= 0 for n in sizes)
    if not are_sizes or max(sizes, default=0) >= 2**40:
        raise RefusedPickle("it holds an array whose shape is no list of sizes")
    return list(sizes)


def shape_of(sizes) -> list:
    """Sizes that a pickle gives, as a shape. A `RefusedPickle` if they are none."""
    shape = sizes_of(sizes)
    if math.prod(n or 1 for n in shape) >= 2**50:
        raise RefusedPickle(f"it holds an array of {shape} numbers")
    return shape


def read_bytes(file, offset: int, length: int) -> np.ndarray:
    """Bytes of a file [length]. A `UserError` if it no longer has them."""
    content = np.fromfile(file, np.uint8, length, offset=offset)
    if content.size != length:
        raise UserError(f"{file}: ends too early; it has changed since it was opened")
    return content


class NumpyArray:
    """An array as NumPy pickles it, empty until its state is known.

    Args:
        file: the path of the file that it is in.
    """

    def __init__(self, file):
        self.file, self.dtype = file, None

    def set_state(self, state) -> None:
        """Take (version, shape, type, whether its columns are contiguous, content)."""
        if type(state) is not tuple or len(state) != 5 or type(state[2]) is not Type:
            raise RefusedPickle("it holds an array that is not made of numbers")
        _, shape, kind, is_fortran, content = state
        self.fill(shape, kind, content, "F" if is_fortran else "C")

    def fill(self, shape, kind: Type, content, order: str) -> "NumpyArray":
        """Take the state; the array itself."""
        self.shape, self.dtype, self.order, self.content = shape_of(shape), kind.dtype, order, content
        size = math.prod(self.shape) * self.dtype.itemsize
        is_known = type(content) is not Bytes or not content.is_text  # a text's size is known when it is decoded
        if type(content) not in (bytes, Bytes) or (is_known and size != length(content)):
            raise RefusedPickle(f"it holds an array of {self.shape} numbers without their {size} bytes")
        return self

    def numpy(self) -> np.ndarray:
        """The array, read now."""
        content = self._content()
        if content.size != math.prod(self.shape) * self.dtype.itemsize:
            raise UserError(f"{self.file}: is damaged: an array of {self.shape} numbers has {content.size} bytes")
        return content.view(self.dtype).reshape(self.shape, order=self.order)

    def _content(self) -> np.ndarray:
        if type(self.content) is bytes:
            return np.frombuffer(self.content, np.uint8)
        content = read_bytes(self.file, self.content.offset, self.content.length)
        if not self.content.is_text:
            return content
        try:
            return np.frombuffer(content.tobytes().decode().encode("latin1"), np.uint8)
        except UnicodeError as error:
            raise UserError(f"{self.file}: is damaged: {error}") from error


def length(content) -> int:
    """The number of bytes of a content, whether it is in memory or in the file."""
    return content.length if type(content) is Bytes else len(content)


class Joined:
    """A large array that Paddle has cut into parts."""

    def __init__(self, parts: list, shape):
        self.parts, self.shape, self.dtype = parts, shape_of(shape), parts[0].dtype
        if sum(math.prod(part.shape) for part in parts) != math.prod(self.shape):
            raise RefusedPickle(f"it holds an array of {self.shape} numbers whose parts have another number of them")

    def numpy(self) -> np.ndarray:
        """The whole array, read now."""
        return np.concatenate([part.numpy().reshape(-1) for part in self.parts]).reshape(self.shape)


class Storage:
    """The numbers that one or several of torch's tensors are views of. `offset` is set when it is known."""

    def __init__(self, file, code: str, count: int):
        self.file, self.dtype, self.count, self.offset = file, NUMPY_TYPES[code], count, None


class TorchTensor:
    """A view of a `Storage`, as numbers of its type or of another `dtype`."""

    def __init__(self, storage, first, shape, strides, dtype=None):
        if type(storage) is not Storage or type(first) is not int or first < 0:
            raise RefusedPickle("it holds a tensor that is not made of numbers in the file")
        self.storage, self.first, self.dtype = storage, first, dtype or storage.dtype
        self.shape, self.strides = shape_of(shape), sizes_of(strides)
        count = math.prod(self.shape)
        self.span = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides)) if count else 0
        # A view may show a number several times; none that a model has is larger than what it shows.
        there_are = storage.count * storage.dtype.itemsize // self.dtype.itemsize
        if len(self.shape) != len(self.strides) or max(first + self.span, count) > there_are:
            raise RefusedPickle(f"it holds a tensor of {self.shape} numbers, more than there are in the file for it")

    def numpy(self) -> np.ndarray:
        """The tensor, read now."""
        offset = self.storage.offset + self.first * self.dtype.itemsize
        content = read_bytes(self.storage.file, offset, self.span * self.dtype.itemsize)
        steps = [step * self.dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(content.view(self.dtype), self.shape, steps)
