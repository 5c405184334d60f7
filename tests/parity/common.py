"""What the comparisons share: recorded numbers, loading of the torch side, comparing tensors of both layouts."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import torch

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import RowDraws
from ppdiffusers_train.runtime.cpu_levers import pull_levers

pull_levers()  # as every run does
torch.set_num_threads(1)  # its threads wait for each other at every tiny layer, for long where the processor is shared


class RecordedDraws:
    """Stands in for `Draws` with numbers that both sides get."""

    timestep_range = (0, 1000)

    def __init__(self, noise, timesteps):
        self.recorded = {"noise": noise, "timesteps": timesteps}

    def normal(self, name, shape):
        assert self.recorded[name].shape[1:] == tuple(shape)
        return paddle.to_tensor(self.recorded[name])

    def integers(self, name, low, high):
        assert (low, high) == self.timestep_range
        return paddle.to_tensor(self.recorded[name])


def torch_part(part_class, folder, part):
    """A model of diffusers or transformers from a pipeline's folder."""
    return part_class.from_pretrained(folder, subfolder=part).eval()


def our_batch(module, size):
    """The first photographs as a batch."""
    rows = build_dataset(module.args)
    samples = [module.preprocess(rows[index], RowDraws(0, index)) for index in range(size)]
    return {name: paddle.to_tensor(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def in_torch_layout(unet):
    """{name: (parameter, whether Paddle stores it transposed)} of a Paddle model."""
    linear = {f"{name}.weight" for name, layer in unet.named_sublayers() if isinstance(layer, paddle.nn.Linear)}
    return {name: (parameter, name in linear) for name, parameter in unet.named_parameters()}


def assert_close(ours, reference, tolerance):
    """All tensors agree, relative to the largest number among them and, each for itself, in norm."""
    scale = max(array.abs().max().item() for array in reference.values())
    worst = 0.0
    for name, (array, transposed) in ours.items():
        array = array.numpy().T if transposed else array.numpy()
        worst = max(worst, np.abs(array - reference[name].numpy()).max() / scale)
    assert ours.keys() == reference.keys()
    assert worst < tolerance, worst
