"""Names of tensors in a single file <-> names in a pipeline's folder, both directions from one table of rules."""

from dataclasses import dataclass

import numpy as np

from ppdiffusers_train.tensor_files import Computed, Stored, as_array, dtype_of, size_in_bytes

# How a tensor differs between the two, beside its name.
TRANSPOSED = "transposed"
HALVES_SWAPPED = "halves swapped"  # along the first axis
CONVOLUTION = "convolution"  # of 1x1 in the single file, a matrix in the folder


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Args:
        original: a name in the single file, or the beginning of names, up to a dot.
        names: the same in the folder; several if the single file has their tensors stacked along the first axis.
        change: how the tensor differs.
    """

    original: str
    names: tuple
    change: str = ""


def to_folder(tensors: dict, rules: list) -> tuple:
    """`({name in the folder: tensor}, names without a rule)` of the tensors of a single file."""
    by_original, found, unknown = {rule.original: rule for rule in rules}, {}, []
    for original, tensor in tensors.items():
        rule, rest = longest_match(original, by_original)
        if rule is None or len(tensor.shape) == 0:
            unknown.append(original)
            continue
        for part, name in enumerate(rule.names):
            found[name + rest] = unchanged(piece(tensor, part, len(rule.names)), rule.change)
    return found, unknown


def to_single_file(tensors: dict, rules: list) -> tuple:
    """`({name in the single file: tensor}, names without a rule)` of the tensors of a part of a folder."""
    by_name, stacks, unknown = {name: rule for rule in rules for name in rule.names}, {}, []
    for name, tensor in tensors.items():
        rule, rest = longest_match(name, by_name)
        if rule is None:
            unknown.append(name)
            continue
        parts = stacks.setdefault(rule.original + rest, {})
        parts[rule.names.index(name[: len(name) - len(rest)])] = changed(tensor, rule.change)
    return {
        original: stacked([parts[number] for number in sorted(parts)]) for original, parts in stacks.items()
    }, unknown


def longest_match(name: str, table: dict) -> tuple:
    """`(entry, rest of the name)` of the longest beginning of `name`, up to a dot, in a table; (None, name) without."""
    start = name
    while start:
        if start in table:
            return table[start], name[len(start) :]
        start = start.rpartition(".")[0]
    return None, name


def piece(tensor, part: int, count: int):
    """Part `part` of a tensor that is divided into `count` equal parts along its first axis."""
    if count == 1:
        return tensor
    rows = tensor.shape[0] // count
    shape = [rows, *tensor.shape[1:]]
    if isinstance(tensor, Stored):  # then the part is a range of bytes, and no more of the file is read
        part_of_file = Stored(tensor.file, tensor.dtype, shape, tensor.offset)
        part_of_file.offset += part * size_in_bytes(part_of_file)
        return part_of_file
    return Computed(dtype_of(tensor), shape, lambda: as_array(tensor)[part * rows : (part + 1) * rows])


def stacked(tensors: list):
    """Tensors stacked along their first axis."""
    if len(tensors) == 1:
        return tensors[0]
    shape = [sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:]]
    return Computed(dtype_of(tensors[0]), shape, lambda: np.concatenate([as_array(tensor) for tensor in tensors]))


def changed(tensor, change: str):
    """A folder's tensor as the single file has it."""
    if change == CONVOLUTION and len(tensor.shape) == 2:
        return reshaped(tensor, [*tensor.shape, 1, 1])
    return exchanged(tensor, change)


def unchanged(tensor, change: str):
    """A single file's tensor as the folder has it: the opposite of `changed`."""
    if change == CONVOLUTION and len(tensor.shape) > 2 and set(tensor.shape[2:]) == {1}:
        return reshaped(tensor, tensor.shape[:2])
    return exchanged(tensor, change)


def exchanged(tensor, change: str):
    """The changes that are their own opposites."""
    if change == TRANSPOSED:
        return Computed(dtype_of(tensor), list(tensor.shape)[::-1], lambda: as_array(tensor).T)
    if change == HALVES_SWAPPED:
        return Computed(dtype_of(tensor), tensor.shape, lambda: np.concatenate(np.split(as_array(tensor), 2)[::-1]))
    return tensor


def reshaped(tensor, shape):
    """A tensor with the same numbers in another shape."""
    return Computed(dtype_of(tensor), shape, lambda: as_array(tensor).reshape(shape))


def count(names, start: str) -> int:
    """How many different words follow `start` in names: the number of blocks or layers."""
    return len({name[len(start) :].split(".")[0] for name in names if name.startswith(start)})
