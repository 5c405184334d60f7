"""What the unchanged parts of a pipeline take on the disk of a result."""

import contextlib
import math
import os
import secrets
from pathlib import Path

from ppdiffusers_train.models.weight_files import WeightFiles
from ppdiffusers_train.tensor_files import FLOATS, size_in_bytes


def exported_bytes(files, target: Path, save_format: str, save_dtype=None) -> int:
    """Bytes that a part of a pipeline takes in a result, unchanged: none where its weights are linked.

    Args:
        files: its `WeightFiles`, or the like, or None.
        target: a folder on the disk of the result.
        save_format: what the result is written for.
        save_dtype: the dtype that all weights are cast to, or None.
    """
    if files is None or (save_dtype is None and is_linked(files, target, save_format)):
        return 0
    tensors, width = files.tensors().values(), {None: 0, "float32": 4}.get(save_dtype, 2)
    return sum(math.prod(t.shape) * width if width and t.dtype in FLOATS else size_in_bytes(t) for t in tensors)


def is_linked(files, target: Path, save_format: str) -> bool:
    """Whether an export consists of hard links to these files."""
    is_plain = isinstance(files, WeightFiles) and not files.is_pickled and save_format != "single_file"
    return is_plain and files.is_torch == (save_format == "diffusers") and can_link(files.files[0], target)


def can_link(file: Path, folder: Path) -> bool:
    """Whether hard links to a file can be made in a folder."""
    link = folder / f".{secrets.token_hex(8)}"
    try:
        os.link(os.path.realpath(file), link)
    except OSError:
        return False
    with contextlib.suppress(OSError):
        link.unlink()
    return True
