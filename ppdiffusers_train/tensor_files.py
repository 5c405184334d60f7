"""Safetensors files in every type they can have. NumPy has no bfloat16 of its own; ml_dtypes adds it."""

from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from ppdiffusers_train.errors import UserError

DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
}


FLOATS = [DTYPES[name] for name in ("F64", "F32", "F16", "BF16")]


def read_tensors(file) -> tuple:
    """`({name: array}, metadata)` of a safetensors file, each array in the type that it has there.

    Raises:
        UserError: it is missing, damaged, or has tensors of a type that is neither float nor integer.
    """
    try:
        with safe_open(str(file), "np") as opened:
            metadata = opened.metadata() or {}
        content = deserialize(Path(file).read_bytes())
        arrays = {
            name: np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
            for name, tensor in content
        }
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors: {error}") from error
    except KeyError as error:
        raise UserError(f"{file}: holds tensors of type {error}; expected one of {', '.join(DTYPES)}") from error
    return arrays, metadata


def write_tensors(file, arrays: dict, metadata: dict) -> None:
    """Write `{name: array}` into a safetensors file."""
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, str(file), metadata)


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
        cast = {name: array.astype(wanted) if array.dtype in FLOATS else array for name, array in arrays.items()}
        if any(cast[name].dtype != array.dtype for name, array in arrays.items()):
            file.unlink()
            write_tensors(file, cast, metadata)
