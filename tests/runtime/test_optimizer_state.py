import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
from paddle import nn

from ppdiffusers_train.runtime.optimizer_state import load_optimizer_tensors, optimizer_tensors


def build():
    layer = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = paddle.optimizer.AdamW(0.1, parameters=layer.parameters(), weight_decay=0.01)
    return layer, optimizer, dict(layer.named_parameters())


def step(layer, optimizer, times):
    for index in range(times):
        layer(paddle.full([2, 3], float(index + 1))).square().sum().backward()
        optimizer.step()
        optimizer.clear_grad()


def test_names_are_structured_and_complete():
    layer, optimizer, parameters = build()
    step(layer, optimizer, 1)
    tensors = optimizer_tensors(optimizer, parameters)
    assert {name.split("//")[0] for name in tensors} == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert len(tensors) == 4 * 4, "two moments and two powers of beta for each"


def test_an_optimizer_with_other_automatic_names_goes_on_with_the_same_bits():
    layer, optimizer, parameters = build()
    step(layer, optimizer, 3)
    tensors = {name: tensor.numpy() for name, tensor in optimizer_tensors(optimizer, parameters).items()}
    other, other_optimizer, other_parameters = build()
    assert other[0].weight.name != layer[0].weight.name
    other.set_state_dict(layer.state_dict())
    load_optimizer_tensors(other_optimizer, other_parameters, tensors)
    step(layer, optimizer, 2)
    step(other, other_optimizer, 2)
    for name, parameter in parameters.items():
        assert np.array_equal(parameter.numpy(), other_parameters[name].numpy())
