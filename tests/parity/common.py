"""What the comparisons share: recorded numbers, loading of the torch side, comparing tensors of both layouts."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import torch

from ppdiffusers_train.cpu.patches import apply_patches
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import RowDraws

apply_patches()  # as every run does
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


def write_pipeline(pipeline, folder):
    """Write a pipeline of diffusers whose models have random weights, by `randomize`; returns the folder."""
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module):
            randomize(part, seed=sum(map(ord, name)))
    pipeline.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize(model, seed):
    """Give every parameter and every buffer that is saved a random value far from its initial one; returns the model.

    Norms whose weights are 1 and biases 0, as they begin, and tables that are computed anyway would hide that one side
    leaves them out, forward or backward.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, layer in model.named_modules() if "Norm" in type(layer).__name__}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name in norms or name == "clip_std":
            tensor.uniform_(0.7, 1.3, generator=generator)
        elif name.endswith("bias"):
            tensor.uniform_(-0.3, 0.3, generator=generator)
        else:  # [out, in, …]: outputs about as large as what goes in
            tensor.normal_(0, max(1, tensor[:1].numel()) ** -0.5, generator=generator)
    return model


def torch_part(part_class, folder, part):
    """A model of diffusers or transformers from a pipeline's folder, which `write_pipeline` has written."""
    model = part_class.from_pretrained(folder, subfolder=part).eval()
    initial = [name for name, tensor in model.state_dict().items() if len(tensor.unique()) == 1]
    assert not initial, f"not random: {initial}"
    return model


def our_batch(module, size):
    """The first photographs as a batch."""
    rows = build_dataset(module.args)
    samples = [module.preprocess(rows[index], RowDraws(0, index)) for index in range(size)]
    return {name: paddle.to_tensor(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def in_torch_layout(unet):
    """{name: (parameter, whether Paddle stores it transposed)} of a Paddle model."""
    linear = {f"{name}.weight" for name, layer in unet.named_sublayers() if isinstance(layer, paddle.nn.Linear)}
    return {name: (parameter, name in linear) for name, parameter in unet.named_parameters()}


def assert_close(ours, reference, tolerance=1e-5):
    """Each tensor agrees, relative to its own norm and a tenth of the largest number: some are rounding alone."""
    assert ours.keys() == reference.keys()
    floor = 0.1 * max(array.abs().max().item() for array in reference.values())
    errors = {}
    for name, (array, transposed) in ours.items():
        array, other = array.numpy().T if transposed else array.numpy(), reference[name].numpy()
        errors[name] = np.linalg.norm(array - other) / (np.linalg.norm(other) + floor)
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, wrong
