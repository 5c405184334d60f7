"""Weights of a model, written and read a tensor at a time: the host never holds a second copy of them.

The libraries' own writers and readers hold all tensors of a file beside the model, some of them twice. Files are
sharded above 10 GB, as theirs are.
"""

from functools import partial
from pathlib import Path

import numpy as np
import paddle

from ppdiffusers_train.cpu.free_memory import return_free_memory
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.unloaded import (
    are_values_later,
    build_new,
    build_unloaded,
    change_before_loading,
    loading_place,
    values_later,
)
from ppdiffusers_train.models.weight_files import SHARED_NAME, find_weights, remove_weights
from ppdiffusers_train.models.weight_names import (
    fitting_tensors,
    linear_weights,
    paddle_tensors,
    require_same_shapes,
    unpublished_biases,
)
from ppdiffusers_train.tensor_files import (
    FLOATS,
    Converted,
    as_array,
    dtype_of,
    is_rehearsal,
    size_in_bytes,
    write_index,
    write_parts,
)

LARGEST_FILE = 10**10  # bytes of tensors, as in both libraries
FILES = {"ppdiffusers": "diffusion_paddle_model.safetensors", "diffusers": "diffusion_pytorch_model.safetensors"}


def save_model(
    model, directory, save_format="ppdiffusers", dtypes=None, largest_file=LARGEST_FILE, tensors=None
) -> None:
    """Write a model's folder, as the library `save_format` does: its configuration, and its weights as safetensors.

    Weights that were there before are removed, whatever their layout and shards.

    Args:
        dtypes: {name: dtype to write a tensor in} where it is not the tensor's own.
        largest_file: bytes of tensors per file; larger weights are sharded.
        tensors: {name: tensor} to write in place of the model's own, such as `stored_tensors`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    remove_weights(directory)
    for_torch = save_format == "diffusers"
    if hasattr(model, "save_config"):
        model.save_config(str(directory), to_diffusers=for_torch)
        name, layout = FILES[save_format], "pt" if for_torch else "pd"
    else:  # paddlenlp's: without weights, it writes the configuration only
        model.save_pretrained(str(directory), state_dict={}, save_function=lambda *_: None)
        name, layout = SHARED_NAME, "pt" if for_torch else "np"
    tensors = written_tensors(model, tensors, dtypes, for_torch)
    parts = write_parts(directory, name.removesuffix(".safetensors"), tensors.items(), largest_file, {"format": layout})
    if len(parts) > 1:
        weight_map = {key: file for file, keys in parts.items() for key in keys}
        write_index(directory / f"{name}.index.json", weight_map, sum(map(size_in_bytes, tensors.values())))


def written_tensors(model, tensors, dtypes, for_torch: bool) -> dict:
    """`{name: tensor}` to write for a model: its own or `tensors`, in `dtypes`, and as torch has it if wished: matrices
    in torch's layout, without biases that are zero and that only ppdiffusers has."""
    tensors, matrices, dtypes = tensors or model.state_dict(), (), dtypes or {}
    if for_torch:
        matrices, unpublished = linear_weights(model), unpublished_biases(model)
        tensors = {key: value for key, value in tensors.items() if key not in unpublished or as_array(value).any()}
    return {
        key: Converted(tensor, dtypes.get(key, dtype_of(tensor)), transposed=key in matrices)
        for key, tensor in tensors.items()
    }


def load_in_place(model, folder) -> None:
    """Set the parameters of `model` to those that `save_model` wrote into `folder`; the objects stay the same.

    Raises:
        UserError: the folder's weights have other names or shapes.
    """
    files = find_weights(folder)
    if files is None:
        raise UserError(f"{Path(folder) / FILES['ppdiffusers']} is missing")
    saved, unpublished = paddle_tensors(files, model), unpublished_biases(model)
    # `written_tensors` leaves these out for torch where they are zero, which they then are in the model, too.
    own = {name: tensor for name, tensor in model.state_dict().items() if name in saved or name not in unpublished}
    require_same_shapes(saved, own, f"{files.files[0]} is of another model")
    set_tensors(own, saved)


@loading_place()
def load_model(part_class, folder: str, files, part: str = ""):
    """The model that `folder` has a configuration of, with the weights of `WeightFiles` in either layout, as float32.
    In a rehearsal, names and shapes of the weights are looked at, and no values are read.

    Args:
        part: the model's name in its pipeline, for `changed_before_loading`.
    Raises:
        UserError: the weights cannot be read, or are not those of the model.
    """
    model = change_before_loading(part, build_unloaded(part_class, folder))
    saved, own = fitting_tensors(model, files), model.state_dict()
    if is_rehearsal():
        return model
    found = {id(own[name]) for name in saved}
    if any(id(tensor) not in found for tensor in own.values()):  # buffers, and biases of ppdiffusers' own
        own = (model := change_before_loading(part, build_new(part_class, folder))).state_dict()
    base = files.files[0].parent
    if are_values_later():
        for name in saved:
            own[name].load_value = partial(set_tensors, {name: own[name]}, {name: saved[name]}, base)
    else:
        set_tensors({name: own[name] for name in saved}, saved, base)
    return model


def load_unread(load):
    """The model that `load()` returns, without the values of its weights, see `unloaded.values_later`."""
    with values_later():
        return load()


@paddle.no_grad()
def load_values(model, dtype: str):
    """Read the values that `load_unread` has left out, one at a time, onto the device in use, cast to a dtype. Returns
    the model."""
    for parameter in model.parameters():
        if hasattr(parameter, "load_value"):
            parameter.load_value()
            del parameter.load_value
            value = parameter.astype(dtype).to(paddle.get_device())
            parameter.value().get_tensor()._share_data_with(value.value().get_tensor())
    return_free_memory()
    return model


def unloaded_copy(part_class, folder: str, files, load) -> tuple:
    """`(model, tensors, dtypes)` for `save_model`, which reads each tensor when it writes it.

    Args:
        part_class, folder, files: as for `load_model`.
        load: returns the model with its weights, where they are not those of the model as it is.
    """
    model = build_unloaded(part_class, folder)
    tensors = stored_tensors(model, files)
    if tensors is None:
        model = load()
    return model, tensors, narrow_types(files, model)


def stored_tensors(model, files):
    """`{name: tensor on disk, in Paddle's layout}` of all tensors of a model without weights (`build_unloaded`).

    None where the files lack a parameter that begins anew: then the model has to be loaded.

    Raises:
        UserError: the weights cannot be read, or are not those of the model.
    """
    own = model.state_dict()
    stored = {id(own[name]): tensor for name, tensor in fitting_tensors(model, files).items()}
    if any(id(parameter) not in stored for parameter in model.parameters()):
        return None
    return {name: stored.get(id(tensor), tensor) for name, tensor in own.items()}  # buffers are made with the model


@paddle.no_grad()
def set_tensors(own: dict, saved: dict, base=None) -> None:
    """Set each tensor of `own` to the value that is saved under its name, cast to its dtype.

    Args:
        base: the folder that the values come from, where they have to be finite.
    Raises:
        UserError: a value of a base is NaN or inf.
    """
    for name, tensor in own.items():
        array = as_array(saved[name]).astype(dtype_of(tensor), copy=False)
        if base and not np.isfinite(array).all():
            raise UserError(f"{base}: {name} has values that are NaN or inf; expected finite weights")
        # Paddle expects bfloat16 as uint16 with the same bits.
        tensor.set_value(array.view("uint16") if array.dtype.name == "bfloat16" else array)


def narrow_types(files, model) -> dict:
    """`{name: dtype}` of a model's tensors that `WeightFiles` hold in 16 bits, for a copy in the same dtypes."""
    saved = {name: tensor.dtype for name, tensor in files.tensors().items() if tensor.dtype in FLOATS}
    usual = next(iter(saved.values()))  # of tensors under other names
    own = model.state_dict()
    types = {name: saved.get(name, usual) for name, tensor in own.items() if dtype_of(tensor) in FLOATS}
    return {name: dtype for name, dtype in types.items() if dtype.itemsize == 2}
