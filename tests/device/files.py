"""What runs have written: types, values and bits of the tensors in their files."""

import json
from pathlib import Path

import numpy as np

from tests.conftest import tensors

LOW_TYPES = {"F16", "BF16", "U16"}  # the last is how Paddle's bfloat16 looks to NumPy


def tensor_files(folder) -> list:
    """The tensor files below a folder, relative to it."""
    return sorted(path.relative_to(folder) for path in Path(folder).rglob("*.safetensors"))


def low_tensors(folder) -> list:
    """`file: tensor (type)` of everything below a folder that is stored in a 16-bit type."""
    found = []
    for file in tensor_files(folder):
        with open(Path(folder) / file, "rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        found += [
            f"{file}: {name} ({about['dtype']})"
            for name, about in header.items()
            if name != "__metadata__" and about["dtype"] in LOW_TYPES
        ]
    return found


def differing(one, other) -> list:
    """`file: tensor` of what is not the same in two folders, to the bit."""
    if tensor_files(one) != tensor_files(other):
        return [f"files: {set(tensor_files(one)) ^ set(tensor_files(other))}"]
    found = []
    for file in tensor_files(one):
        left, right = tensors(Path(one) / file), tensors(Path(other) / file)
        if left.keys() != right.keys():
            found.append(f"{file}: names {sorted(left.keys() ^ right.keys())[:3]}")
        found += [f"{file}: {name}" for name in left.keys() & right.keys() if not same_bits(left[name], right[name])]
    return found


def same_bits(one, other) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def not_finite(folder) -> list:
    """`file: tensor` of everything below a folder that holds NaN or inf."""
    return [
        f"{file}: {name}"
        for file in tensor_files(folder)
        for name, array in tensors(Path(folder) / file).items()
        if array.dtype.kind == "f" and not np.isfinite(array).all()
    ]


def fits(array, dtype):
    """Which of the numbers of a float32 array a low type has, too."""
    if dtype == "fp16":
        return array.astype("float16").astype("float32") == array
    return array.view("uint32") & 0xFFFF == 0
