"""Weights of a model, read back in place."""

from pathlib import Path

import paddle
from safetensors.paddle import load_file

from ppdiffusers_train.errors import UserError

WEIGHTS_FILE = "diffusion_paddle_model.safetensors"


@paddle.no_grad()
def load_in_place(model, folder) -> None:
    """Set the parameters of `model` to those that its `save_pretrained` wrote into `folder`; the objects stay the same.

    Raises:
        UserError: the folder holds weights of another shape of model.
    """
    file = Path(folder) / WEIGHTS_FILE
    saved, own = load_file(str(file)), model.state_dict()
    wrong = [
        f"{name} {list(saved[name].shape) if name in saved else 'missing'} instead of "
        f"{list(own[name].shape) if name in own else 'nothing'}"
        for name in sorted({*saved, *own})
        if name not in saved or name not in own or list(saved[name].shape) != list(own[name].shape)
    ]
    if wrong:
        raise UserError(f"{file} is of another model: {wrong[0]} ({len(wrong)} differences)")
    for name, tensor in own.items():
        tensor.set_value(saved[name])
