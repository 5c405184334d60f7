"""Safetensors files in every type they can have, mapped into memory for reading and written a tensor at a time.

NumPy has no bfloat16 of its own; ml_dtypes adds it. Larger sets are divided, as Hugging Face's libraries divide them:
`<stem>-00001-of-00003.safetensors` and so on.
"""

import json
import mmap
import re
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ppdiffusers_train.errors import UserError

DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
FLOATS = [DTYPES[name] for name in ("F64", "F32", "F16", "BF16")]
CODES = {dtype.name: code for code, dtype in DTYPES.items()}


def read_tensors(file) -> tuple:
    """`({name: array}, metadata)` of a safetensors file, each array in the type that it has there.

    The arrays are views of the file, which is mapped into memory: they cannot be written to, and are read when used.

    Raises:
        UserError: it is missing, damaged, or has tensors of a type that `DTYPES` does not know.
    """
    try:
        with safe_open(str(file), "np"):  # which checks the header, and that the file is as long as it says
            pass
        with open(file, "rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:start])
        metadata = header.pop("__metadata__", {})
        arrays = {
            name: np.frombuffer(
                mapped, DTYPES[tensor["dtype"]], int(np.prod(tensor["shape"])), start + tensor["data_offsets"][0]
            ).reshape(tensor["shape"])
            for name, tensor in header.items()
        }
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors: {error}") from error
    except KeyError as error:
        raise UserError(f"{file}: holds tensors of type {error}; expected one of {', '.join(DTYPES)}") from error
    return arrays, metadata


def write_tensors(file, tensors: dict, metadata: dict) -> None:
    """Write `{name: array or Paddle tensor}` into a new safetensors file, which takes the place of one that is there.

    A tensor is fetched from its device when it is written; the host holds one at a time. (The library's writer wants
    all of them, and in its version 0.4 a second time as bytes.)
    """
    ordered = sorted(
        tensors, key=lambda name: -_itemsize(tensors[name])
    )  # so each lies at a multiple of its type's size
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in ordered:
        start, end = end, end + size_in_bytes(tensors[name])
        code, shape = CODES[_type_name(tensors[name])], list(tensors[name].shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    Path(file).unlink(missing_ok=True)  # it may be a hard link to somebody else's, or mapped
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            opened.write(as_array(tensors[name]).reshape(-1).view(np.uint8))


def as_array(tensor) -> np.ndarray:
    """An array or a Paddle tensor of any type as an array."""
    array = tensor.numpy() if hasattr(tensor, "numpy") else tensor
    # Paddle gives a bfloat16's bits as uint16.
    return np.ascontiguousarray(array).view(DTYPES[CODES[_type_name(tensor)]]).reshape(tensor.shape)


def size_in_bytes(tensor) -> int:
    """What an array or a Paddle tensor takes in a file, without looking at its values."""
    return int(np.prod(tensor.shape)) * _itemsize(tensor)


def _itemsize(tensor) -> int:
    return DTYPES[CODES[_type_name(tensor)]].itemsize


def _type_name(tensor) -> str:
    return str(tensor.dtype).removeprefix("paddle.")


def write_parts(folder, stem: str, tensors, limit: int = 2**30, metadata=None) -> dict:
    """Write tensors into `<stem>.safetensors` or, beyond `limit` bytes, into several files
    `<stem>-00001-of-00003.safetensors`. Files of that stem which stood there are gone afterwards.

    Args:
        tensors: pairs (name, array or Paddle tensor). They are fetched from their device one at a time.
        limit: bytes of tensors in a file; a larger tensor has a file of its own.
        metadata: of each file.
    Returns:
        {file name: names of the tensors in it}.
    """
    parts, room = [{}], limit
    for name, tensor in tensors:
        size = size_in_bytes(tensor)
        if parts[-1] and size > room:
            parts.append({})
            room = limit
        parts[-1][name] = tensor
        room -= size
    for stale in part_files(folder, stem):
        stale.unlink()
    names = [f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        names = [f"{stem}.safetensors"]
    for name, part in zip(names, parts):
        write_tensors(Path(folder) / name, part, metadata or {})
    return {name: list(part) for name, part in zip(names, parts)}


def read_parts(folder, stem: str):
    """Yield (name, array) of all tensors that `write_parts` put into `folder` as `stem`. The arrays are views of files
    mapped into memory, one after the other: who keeps none of them never holds more than one.

    Raises:
        UserError: a file is missing, which it names, or damaged.
    """
    for file in complete_parts(folder, stem):
        yield from read_tensors(file)[0].items()


def complete_parts(folder, stem: str) -> list:
    """The files of a stem in their order.

    Raises:
        UserError: there is none, one is missing, or they are of two sets.
    """
    files = part_files(folder, stem)
    if not files:
        raise UserError(f"{Path(folder) / f'{stem}.safetensors'} is missing")
    counts = {(re.findall(r"-of-(\d+)\.safetensors$", file.name[len(stem) :]) or [""])[0] for file in files}
    if len(counts) > 1:
        raise UserError(f"{folder} holds {files[0].name} and {files[-1].name}, which are of two sets; expected one")
    if (count := counts.pop()) and len(files) < int(count):
        expected = (f"{stem}-{i + 1:0{len(count)}d}-of-{count}.safetensors" for i in range(int(count)))
        missing = next(name for name in expected if not (Path(folder) / name).is_file())
        raise UserError(f"{Path(folder) / missing} is missing; {len(files)} of {int(count)} files are there")
    return files


def part_files(folder, stem: str) -> list:
    """The files of a stem that there are, divided or not."""
    name = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors")
    return sorted(path for path in Path(folder).iterdir() if name.fullmatch(path.name))


def first_dtype(file) -> np.dtype:
    """Type of a safetensors file's first tensor."""
    with safe_open(str(file), "np") as tensors:
        return DTYPES.get(tensors.get_slice(next(iter(tensors.keys()))).get_dtype(), np.dtype("float32"))


def cast_files(folder, dtype: str) -> None:
    """Give every floating-point tensor in the safetensors files below `folder` the type "float32", "float16" or
    "bfloat16". A file is replaced, never written into: it may be a hard link to somebody else's."""
    wanted = {"float32": DTYPES["F32"], "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]}[dtype]
    for file in Path(folder).rglob("*.safetensors"):
        arrays, metadata = read_tensors(file)
        if any(array.dtype in FLOATS and array.dtype != wanted for array in arrays.values()):
            cast = {name: Cast(array, wanted) if array.dtype in FLOATS else array for name, array in arrays.items()}
            write_tensors(file, cast, metadata)


class Cast:
    """A tensor in another type, worked out when it is fetched."""

    def __init__(self, tensor, dtype: np.dtype):
        self.tensor, self.dtype, self.shape = tensor, dtype, tensor.shape

    def numpy(self) -> np.ndarray:
        """The values in the other type."""
        return as_array(self.tensor).astype(self.dtype)
