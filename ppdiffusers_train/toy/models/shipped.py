"""The toys' trained weights as the package ships them: float16, one safetensors file per model."""

from pathlib import Path

import numpy as np
import paddle
from safetensors.numpy import load_file, save

FOLDER = Path(__file__).parents[1] / "weights"


def write_weights(file, models: dict, **measured) -> None:
    """Write models' weights, and measured arrays, as float16.

    Args:
        models: {prefix of the weights' names: model}.
    """
    arrays = {
        f"{prefix}{name}": tensor.numpy()
        for prefix, model in models.items()
        for name, tensor in model.state_dict().items()
    }
    halved = {name: np.asarray(array, np.float16) for name, array in {**arrays, **measured}.items()}
    Path(file).write_bytes(save(halved))  # not save_file, whose files are readable only by their owner


@paddle.no_grad()
def load_weights(model, file, prefix: str = ""):
    """Set all weights of `model` to those of `file` whose names begin with `prefix`, in evaluation mode. Returns it."""
    arrays = load_file(file)
    for name, tensor in model.state_dict().items():
        tensor.set_value(arrays[prefix + name].astype(np.float32))
    model.eval()
    return model


def load_array(file, name: str) -> np.ndarray:
    """One array of `file`, as float32."""
    return load_file(file)[name].astype(np.float32)
