"""The operators of `tests/operators.py` against torch's: values and gradients, whichever gradients are asked for."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.operators import (
    CLASSES,
    IDS,
    MASK,
    OPERATORS,
    TIMES,
    inputs_of,
    output_and_gradients,
    wanted_gradients,
    weights_of,
)


def layer_norm(x, weight=None, bias=None):
    return functional.layer_norm(x, x.shape[-1:], weight, bias)


def group_norm(x, weight=None, bias=None):
    if weight is None:
        weight = torch.ones(x.shape[1])  # torch fails with a bias alone
    return functional.group_norm(x, 2, weight, bias)


def linear(x, weight, bias=None):
    return functional.linear(x, weight.T, bias)


def geglu(x, weight, bias):
    value, gate = linear(x, weight, bias).chunk(2, dim=-1)
    return value * functional.gelu(gate)


def attention(query, key, value):
    mask = torch.tensor(MASK, dtype=query.dtype)
    return functional.scaled_dot_product_attention(query, key, value, mask)


def joint_attention(query, key, value):
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def of_type(x, numbers):
    return torch.tensor(numbers, dtype=x.dtype)


def same_names(function, *names):
    return dict.fromkeys(names, function)


IN_TORCH = {
    **same_names(layer_norm, *(name for name in OPERATORS if name.startswith("layer_norm"))),
    **same_names(group_norm, *(name for name in OPERATORS if name.startswith("group_norm"))),
    **same_names(linear, "linear", "linear without bias"),
    "conv2d": lambda x, weight, bias: functional.conv2d(x, weight, bias, padding=1),
    "conv2d of a stride": lambda x, weight, bias: functional.conv2d(x, weight, bias, 2, 1),
    "conv2d in groups": lambda x, weight: functional.conv2d(x, weight, groups=2),
    "conv2d of one pixel": functional.conv2d,
    "avg_pool2d": lambda x: functional.avg_pool2d(x, 2, 2),
    "interpolate": lambda x: functional.interpolate(x, scale_factor=2.0, mode="nearest"),
    "interpolate to a size": lambda x: functional.interpolate(x, size=[7, 5], mode="nearest"),
    "pad": lambda x: functional.pad(x, (0, 1, 0, 1)),
    "silu": lambda x: functional.silu(x),
    "gelu": functional.gelu,
    "gelu by tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "geglu": geglu,
    "softmax": lambda x: functional.softmax(x, dim=-1),
    "attention": attention,
    "joint attention": joint_attention,
    "embedding": lambda weight: functional.embedding(torch.tensor(IDS), weight),
    "cross_entropy": lambda x: functional.cross_entropy(x, torch.tensor(CLASSES), reduction="none"),
    "cross_entropy of shares": lambda x: functional.cross_entropy(x, of_type(x, [[0.2, 0.8, 0], [0, 0.5, 0.5]])),
    "binary_cross_entropy": lambda x: functional.binary_cross_entropy_with_logits(
        x, of_type(x, [1, 0, 1]), reduction="none"
    ),
    "matmul": lambda x, y: x @ y,
    "matmul transposed": lambda x, y: torch.matmul(x.mT, y.mT),
    "bmm": lambda x, y: torch.bmm(x, y),
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y,
    "divide by a number": lambda x: x / 3.0 + 1.0 / (2.0 + x.square()),
    "square root": lambda x: (x.square() + 1).sqrt(),
    "clip": lambda x: torch.clamp(x, -0.5, 0.5),
    "cast": lambda x: x.double() * 2,
    "mean": lambda x: x.mean(dim=[1, 2]),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "concat": lambda x, y: torch.cat([x, y], dim=1),
    "stack": lambda x, y: torch.stack([x, y]),
    "split": lambda x: x.chunk(2, dim=-1)[1] - x.chunk(2, dim=-1)[0],
    "slice": lambda x: x[:, :2] * x[:, -1:],
    "expand": lambda x, y: y.expand(2, 3, 4) * x,
    "reshape": lambda x: x.flatten(1).reshape(2, 2, 6).unsqueeze(1).permute(0, 3, 1, 2).squeeze(2),
    "gather_nd": lambda x: x[[0, 1], [2, 0]],
    "rows": lambda x: x[torch.arange(2), torch.tensor(TIMES)],
}


def test_every_operator_has_a_counterpart():
    assert OPERATORS.keys() == IN_TORCH.keys()


@pytest.mark.parametrize(
    "name, wanted", [(name, wanted) for name in OPERATORS for wanted in wanted_gradients(name)], ids=str
)
def test_values_and_gradients_agree(name, wanted):
    y, gradients = output_and_gradients(name, wanted)
    tensors = {
        key: torch.tensor(array, dtype=torch.float32, requires_grad=key in wanted)
        for key, array in inputs_of(name).items()
    }
    reference = IN_TORCH[name](**tensors)
    (reference * of_type(reference, weights_of(reference.shape))).sum().backward()
    pairs = [(y.numpy(), reference.detach()), *((gradients[key], tensors[key].grad) for key in wanted)]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs.numpy()).max() <= 3e-6 * theirs.abs().max().item()
