"""The layouts of pickled weights: Paddle's, and torch's two."""

import math
import os
import struct
import zipfile
from pathlib import Path

import numpy as np

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.pickles.arrays import Joined, NumpyArray, TorchTensor
from ppdiffusers_train.pickles.builders import Builder
from ppdiffusers_train.pickles.machine import Machine, Part, RefusedPickle

SUFFIXES = (".pdparams", ".bin", ".ckpt", ".pt", ".pth")
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in torch's older files
CUT_ARRAYS = "UnpackBigParamInfor@@"  # Paddle's list of arrays that it has cut into parts
MOST_COPIES = 8  # how often a number of the file may occur in its tensors
# What Python raises on structures that no writer makes.
MALFORMED = (
    RefusedPickle, OSError, zipfile.BadZipFile, struct.error, LookupError, TypeError, ValueError, AttributeError,
    ArithmeticError, NotImplementedError, RecursionError,
)  # fmt: skip
LOCAL_HEADER = 30  # bytes of a zip member's header, without its name


def is_safetensors(file) -> bool:
    """Whether a file begins as safetensors do: with the length of a header in JSON."""
    start = first_bytes(file)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= os.path.getsize(file)


def is_pickle(file) -> bool:
    """Whether a file begins as pickles do, or as the archives of torch."""
    return not is_safetensors(file) and first_bytes(file).startswith((b"PK\x03\x04", b"\x80"))


def first_bytes(file) -> bytes:
    """The first nine bytes of a file; none if it cannot be read."""
    try:
        with open(file, "rb") as opened:
            return opened.read(9)
    except OSError:
        return b""


def open_pickle(file) -> dict:
    """`{name: tensor}` of pickled weights; each has a dtype and a shape, and is read when `numpy()` is called.

    Weights below the key `state_dict`, as Lightning writes them, are found. Entries that are no numbers are left out.

    Raises:
        UserError: the file is damaged, or holds more than numbers; nothing of it has run.
    """
    try:
        with open(file, "rb") as opened:
            tensors = named_tensors(_read(opened, Path(file)))
            _require_modesty(tensors, os.fstat(opened.fileno()).st_size)
        return tensors
    except MALFORMED as error:
        raise UserError(
            f"{file}: cannot be read as pickled weights: {error}; expected arrays of numbers only, of a whole file: "
            "convert it to safetensors where you trust it, or download it again"
        ) from error


def _read(opened, path: Path):
    size = os.fstat(opened.fileno()).st_size
    if opened.read(4) == b"PK\x03\x04":
        return _read_zip(opened, path, size)
    builder, source = Builder(path), Part(opened, 0, size)
    content = _unpickle(source, builder)
    return _read_older(source, builder) if content == TORCH_MAGIC else content


def _unpickle(source: Part, builder: Builder):
    return Machine(source, builder.call, builder.set_state, builder.storage).run()


def _read_zip(opened, path: Path, size: int):
    """torch's files: the pickle and each storage are members of an archive, stored as they are."""
    with zipfile.ZipFile(opened) as archive:
        members = {}
        for member in archive.infolist():
            if member.filename in members:
                raise RefusedPickle(f"it has two members called {member.filename!r:.80}")
            members[member.filename] = member
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise RefusedPickle("it is an archive without one data.pkl, not a file of torch.save")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members:
        order = _range(opened, members[f"{folder}byteorder"], size)
        if Part(opened, *order).read(order[1] - order[0]) != b"little":
            raise RefusedPickle("its numbers are in another order of bytes; expected little")
    builder = Builder(path)
    content = _unpickle(Part(opened, *_range(opened, members[pickles[0]], size)), builder)
    for key, storage in builder.storages.items():
        if f"{folder}data/{key}" not in members:
            raise RefusedPickle(f"its storage {key:.40} is missing")
        storage.offset, end = _range(opened, members[f"{folder}data/{key}"], size)
        _require_size(key, storage, end - storage.offset)
    return content


def _range(opened, member, size: int) -> tuple:
    """(first byte, end) of a member that is stored as it is."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise RefusedPickle(f"its member {member.filename!r:.80} is compressed; torch stores numbers as they are")
    header = Part(opened, member.header_offset, size).read(LOCAL_HEADER)
    name, extra = struct.unpack("<HH", header[26:])
    start = member.header_offset + LOCAL_HEADER + name + extra
    if header[:4] != b"PK\x03\x04" or start + member.file_size > size:
        raise RefusedPickle("it ends too early")
    return start, start + member.file_size


def _read_older(source: Part, builder: Builder):
    """torch's files before version 1.6: several pickles one after the other, then all storages."""
    _unpickle(source, builder)  # the version of the layout
    system = _unpickle(source, builder)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise RefusedPickle("its numbers are in another order of bytes; expected little")
    content = _unpickle(source, builder)
    keys = _unpickle(source, builder)
    if type(keys) is not list or {*builder.storages} != {key for key in keys if type(key) is str}:
        raise RefusedPickle("its list of storages is not that of its tensors")
    for key in keys:
        storage = builder.storages[key]
        count = int.from_bytes(source.read(8), "little")
        storage.offset = source.tell()
        _require_size(key, storage, count * storage.dtype.itemsize)
        source.skip(count * storage.dtype.itemsize)
    return content


def _require_size(key: str, storage, found: int) -> None:
    expected = storage.count * storage.dtype.itemsize
    if found != expected:
        raise RefusedPickle(f"its storage {key:.40} has {found} bytes; expected {expected}")


def named_tensors(content) -> dict:
    """`{name: tensor}` of what a file of weights holds."""
    if type(content) is not dict:
        raise RefusedPickle("it holds no dictionary of weights")
    content = dict(content)
    for name, cut in content.pop(CUT_ARRAYS, {}).items():
        parts = [content.pop(part) for part in cut["slices"]]
        if not parts or not all(isinstance(part, NumpyArray) and part.dtype for part in parts):
            raise RefusedPickle(f"the parts of {name:.80} are no arrays")
        content[name] = Joined(parts, cut["OriginShape"])
    found = {name: as_tensor(value) for name, value in content.items() if type(name) is str}
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    if not any(isinstance(value, (NumpyArray, TorchTensor, Joined)) for value in found.values()):
        if type(content.get("state_dict")) is dict:
            return named_tensors(content["state_dict"])
        raise RefusedPickle("it holds no arrays under names")
    return found


def _require_modesty(tensors: dict, size: int) -> None:
    """Refuse a small file whose tensors, as views of the same numbers, would fill the memory."""
    needed = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    if needed > MOST_COPIES * size:
        raise RefusedPickle(f"its tensors have {needed} bytes, but the file has only {size}")


def as_tensor(value):
    """A value of a dictionary of weights as a tensor; None if it is none. Paddle pairs tensors with their names."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is str:
        value = value[1]
    if isinstance(value, NumpyArray) and value.dtype is None:
        raise RefusedPickle("it holds an array without numbers")
    if isinstance(value, (NumpyArray, TorchTensor)):
        return value
    if type(value) in (int, float, bool) and not (type(value) is int and abs(value) >= 2**63):
        return np.asarray(value, np.float32 if type(value) is float else None)
    return value if isinstance(value, Joined) else None
