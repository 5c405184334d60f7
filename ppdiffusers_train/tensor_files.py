"""Files of tensors of every dtype: safetensors, read and written one tensor at a time, and pickles, read only.

NumPy has no bfloat16; ml_dtypes adds it. Large sets are split into several files, as in Hugging Face's libraries:
`<stem>-00001-of-00003.safetensors` and so on.
"""

import contextlib
import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.pickles.files import SUFFIXES as PICKLES
from ppdiffusers_train.pickles.files import is_pickle, is_safetensors, open_pickle

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
STEADY_BYTES = 2**26
CODES = {dtype.name: code for code, dtype in DTYPES.items()}


_rehearsals = []  # a list has one element per context


@contextlib.contextmanager
def rehearsal():
    """A context in which everything is opened and written as ever, but no weights are read or written: files of tensors
    get their header only, and pipelines load models without weights. So what a run will need is known before it begins.
    """
    _rehearsals.append(True)
    try:
        yield
    finally:
        _rehearsals.pop()


def is_rehearsal() -> bool:
    """Whether this is within a `rehearsal`."""
    return bool(_rehearsals)


def rehearsed_size(file: Path) -> int:
    """The size that a file would have which was written in a rehearsal."""
    if file.suffix != ".safetensors":
        return file.stat().st_size
    ends = [tensor.offset + size_in_bytes(tensor) for tensor in read_header(file)[0].values()]
    return max(ends, default=file.stat().st_size)


class Stored:
    """A tensor in a safetensors file, read when it is fetched."""

    def __init__(self, file, dtype: np.dtype, shape: list, offset: int):
        self.file, self.dtype, self.shape, self.offset = file, dtype, shape, offset

    def numpy(self) -> np.ndarray:
        """The tensor as an array."""
        content = np.fromfile(self.file, np.uint8, size_in_bytes(self), offset=self.offset)
        return content.view(self.dtype).reshape(self.shape)


class Converted:
    """A tensor in another dtype, or a transposed matrix; converted when it is fetched."""

    def __init__(self, tensor, dtype: np.dtype, transposed: bool = False):
        self.tensor, self.dtype, self.transposed = tensor, dtype, transposed
        self.shape = list(tensor.shape)[::-1] if transposed else list(tensor.shape)

    def numpy(self) -> np.ndarray:
        """The converted tensor as an array."""
        array = as_array(self.tensor).astype(self.dtype, copy=False)
        return array.T if self.transposed else array


class Computed:
    """A tensor that is computed when it is fetched.

    Args:
        compute: returns the array, of the given dtype and shape.
    """

    def __init__(self, dtype: np.dtype, shape, compute):
        self.dtype, self.shape, self.numpy = dtype, list(shape), compute


def open_tensors(file, any_name: bool = False) -> tuple:
    """`({name: tensor}, metadata)` of a safetensors file or pickled weights; a tensor is read when it is fetched.

    Args:
        any_name: whether pickled weights may have a name of safetensors files.
    Raises:
        UserError: it is missing, damaged, has tensors of a dtype that is not in `DTYPES`, or is a pickle of more.
    """
    may_be_pickled = str(file).endswith(PICKLES) or (any_name and is_pickle(file))
    if may_be_pickled and not is_safetensors(file):
        return open_pickle(file), {"format": "pd" if str(file).endswith(".pdparams") else "pt"}
    try:
        with safe_open(str(file), "np"):  # checks the header and the length of the file
            pass
        return read_header(file)
    except (OSError, SafetensorError) as error:
        found = "it is pickled, whatever its name" if is_pickle(file) else error
        raise UserError(f"{file}: cannot be read as safetensors: {found}") from error
    except KeyError as error:
        raise UserError(f"{file}: holds tensors of type {error}; expected one of {', '.join(DTYPES)}") from error


def read_header(file) -> tuple:
    """What `open_tensors` returns, of a file whose header is known to be right."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: Stored(file, DTYPES[tensor["dtype"]], tensor["shape"], 8 + length + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }
    return tensors, metadata


def read_tensors(file) -> tuple:
    """`({name: array}, metadata)` of a file of tensors, each array in its stored dtype.

    Raises:
        UserError: see `open_tensors`.
    """
    tensors, metadata = open_tensors(file)
    return {name: as_array(tensor) for name, tensor in tensors.items()}, metadata


def write_tensors(file, tensors: dict, metadata: dict) -> None:
    """Write `{name: tensor}` into a safetensors file: arrays, Paddle tensors, or objects of this module's classes.

    A tensor is fetched when it is written, so the host holds one at a time. (The library's writer needs all of them in
    memory, and in version 0.4 a second copy as bytes.) An existing file is replaced, never written into: it may be a
    hard link to another file, or hold the tensors that are written.
    """
    # Large dtypes first, so that each tensor is aligned to the size of its dtype.
    ordered = sorted(tensors, key=lambda name: -dtype_of(tensors[name]).itemsize)
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in ordered:
        start, end = end, end + size_in_bytes(tensors[name])
        code, shape = CODES[dtype_of(tensors[name]).name], list(tensors[name].shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = Path(file).with_name(f".{Path(file).name}.tmp")
    try:
        with open(temporary, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for name in () if is_rehearsal() else ordered:
                write_steadily(opened, as_array(tensors[name]).reshape(-1).view(np.uint8))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)  # left after an error such as a full disk


def write_steadily(opened, content: np.ndarray) -> None:
    """Write bytes and sync them to disk at intervals. Otherwise one sync at the end could take minutes on a slow disk,
    and this process would look as if it hung."""
    for start in range(0, content.size, STEADY_BYTES):
        before = opened.tell()
        opened.write(content[start : start + STEADY_BYTES])
        if before // STEADY_BYTES < opened.tell() // STEADY_BYTES:
            opened.flush()
            os.fdatasync(opened.fileno())


def as_array(tensor) -> np.ndarray:
    """A tensor of any kind as a contiguous array in its own dtype."""
    array = tensor.numpy() if hasattr(tensor, "numpy") else tensor
    # Paddle returns bfloat16 as uint16.
    return np.ascontiguousarray(array).view(dtype_of(tensor)).reshape(tensor.shape)


def first_not_finite(tensors: dict):
    """The name of the first tensor of floating-point numbers that has a NaN or an inf, or None. One is read at a
    time."""
    floats = (name for name, tensor in tensors.items() if dtype_of(tensor) in FLOATS)
    return next((name for name in floats if not np.isfinite(as_array(tensors[name])).all()), None)


def size_in_bytes(tensor) -> int:
    """Bytes of a tensor in a file, without fetching it."""
    return int(np.prod(tensor.shape)) * dtype_of(tensor).itemsize


def dtype_of(tensor) -> np.dtype:
    """The NumPy dtype of a tensor of any kind."""
    return DTYPES[CODES[str(tensor.dtype).removeprefix("paddle.")]]


def open_parts(folder: Path, stem: str) -> dict:
    """`{name: tensor}` of what `write_parts` wrote. A tensor is read when it is fetched."""
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    return {name: tensor for file in files for name, tensor in open_tensors(file)[0].items()}


def write_parts(folder, stem: str, tensors, limit: int = 2**30, metadata=None) -> dict:
    """Write tensors into `<stem>.safetensors` or, beyond `limit` bytes, into several files
    `<stem>-00001-of-00003.safetensors`. Existing files of that stem are removed first.

    Args:
        tensors: pairs (name, array or Paddle tensor). They are fetched from their device one at a time.
        limit: bytes of tensors in a file; a larger tensor has a file of its own.
        metadata: that of each file.
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


def part_files(folder, stem: str) -> list:
    """The existing files of a stem, whether one or several."""
    name = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors")
    return sorted(path for path in Path(folder).iterdir() if name.fullmatch(path.name))


def cast_files(folder, dtype: str) -> None:
    """Cast every floating-point tensor in the safetensors files below `folder` to "float32", "float16" or "bfloat16".
    Files are replaced, never written into: they may be hard links to other files.

    A tensor with values that overflow the dtype keeps its own, and a line about it is printed.
    """
    wanted = {"float32": DTYPES["F32"], "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]}[dtype]
    for file in Path(folder).rglob("*.safetensors"):
        tensors, metadata = open_tensors(file)
        floats = {}
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOATS or tensor.dtype == wanted:
                continue
            if fits(tensor, wanted):
                floats[name] = Converted(tensor, wanted)
            else:
                print(f"--save_dtype {dtype}: {name} has values too large for it and stays {tensor.dtype}")
        if floats:
            write_tensors(file, {**tensors, **floats}, metadata)
    for index in Path(folder).rglob("*.safetensors.index.json"):
        correct_size(index)


def fits(tensor, dtype: np.dtype) -> bool:
    """Whether a dtype can hold all finite values of a tensor; only float16 has a smaller range."""
    if dtype != DTYPES["F16"]:
        return True
    sizes = np.abs(as_array(tensor).astype("float32"))
    return not bool((np.isfinite(sizes) & (sizes > np.finfo(np.float16).max)).any())


def correct_size(index: Path) -> None:
    """Update the total size in the index of a split set of files."""
    content = json.loads(index.read_text(encoding="utf-8"))
    files = {index.with_name(name) for name in content["weight_map"].values()}
    sizes = [size_in_bytes(tensor) for file in files for tensor in open_tensors(file)[0].values()]
    write_index(index, content["weight_map"], sum(sizes))


def write_index(file: Path, weight_map: dict, total_size: int) -> None:
    """Write the index of a split set of files.

    Args:
        weight_map: {tensor: name of the file that holds it}.
        total_size: bytes of all tensors.
    """
    content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    file.unlink(missing_ok=True)  # it may be a hard link to another file
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
