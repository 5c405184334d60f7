"""Moving tensors that are not needed for a while out of a device's memory, and back."""

import contextlib
import tempfile
from collections import defaultdict

import numpy as np
import paddle

from ppdiffusers_train.cpu.free_memory import return_free_memory
from ppdiffusers_train.errors import writing
from ppdiffusers_train.runtime.precision import share_storage


@contextlib.contextmanager
def swapped_out(tensors, folder):
    """A context in which tensors have no values and take no memory of the device; Paddle refuses to compute with them.

    Those of a GPU are kept in the host's memory, those of the host in a file in `folder` that has no name, so a killed
    process leaves none. Afterwards all have the same bits, and tensors that shared their storage share it again.

    After an error they stay as they are.

    Raises:
        WriteError: the file cannot be written.
    """
    with contextlib.ExitStack() as opened:
        kept, file = [], None
        with writing("weights that are not needed while samples are encoded", folder):
            if paddle.get_device().startswith("cpu"):
                file = opened.enter_context(tempfile.TemporaryFile(dir=folder))
            for sharing in by_storage(tensors):
                kept.append((sharing, keep(sharing[0], file)))
                for tensor in sharing:
                    tensor.value().get_tensor()._clear()
        return_free_memory()
        yield
        if file:
            file.seek(0)
        for sharing, values in kept:
            restore(sharing, values, file)


def by_storage(tensors) -> list:
    """Lists of tensors that share their storage, of those that are on the device in use and have elements."""
    on_host, found = paddle.get_device().startswith("cpu"), defaultdict(dict)
    for tensor in tensors:
        if tensor.size and tensor.place.is_cpu_place() == on_host:
            found[tensor.data_ptr()][id(tensor)] = tensor
    return [list(sharing.values()) for sharing in found.values()]


def keep(tensor, file):
    """The values of a tensor as NumPy has them; where they are written to a file, only their type there."""
    array = tensor.numpy()  # bfloat16 as uint16
    if file is None:
        return array
    file.write(np.ascontiguousarray(array).data)  # `tofile` would hide why a disk refuses
    return array.dtype


def restore(sharing: list, kept, file) -> None:
    """Give tensors that share their storage their values again: what `keep` returned, or what is next in the file."""
    first = sharing[0]
    array = kept if file is None else np.fromfile(file, kept, first.size).reshape(first.shape)
    values = paddle.empty(first.shape, first.dtype)
    values.set_value(array)
    for tensor in sharing:
        share_storage(tensor, values)
