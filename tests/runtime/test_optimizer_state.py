import ppdiffusers_train  # noqa: F401

import tracemalloc

import numpy as np
import paddle
from paddle import nn

from ppdiffusers_train.runtime.optimizer_state import load_optimizer_tensors, optimizer_tensors
from ppdiffusers_train.tensor_files import open_parts, size_in_bytes, write_parts


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
    tensors = optimizer_tensors(optimizer, parameters)
    other, other_optimizer, other_parameters = build()
    assert other[0].weight.name != layer[0].weight.name
    other.set_state_dict(layer.state_dict())
    load_optimizer_tensors(other_optimizer, other_parameters, tensors)
    step(layer, optimizer, 2)
    step(other, other_optimizer, 2)
    for name, parameter in parameters.items():
        assert np.array_equal(parameter.numpy(), other_parameters[name].numpy())


def test_the_host_holds_a_tensor_of_the_state_that_it_writes_and_reads(tmp_path):
    layer = nn.Sequential(*(nn.Linear(200, 200) for _ in range(20)))
    optimizer = paddle.optimizer.AdamW(0.1, parameters=layer.parameters())
    layer(paddle.ones([2, 200])).sum().backward()
    optimizer.step()
    parameters = dict(layer.named_parameters())
    tensors = optimizer_tensors(optimizer, parameters)
    total = sum(map(size_in_bytes, tensors.values()))
    tracemalloc.start()
    try:
        write_parts(tmp_path, "optimizer", tensors.items(), limit=total // 3)
        load_optimizer_tensors(optimizer, parameters, open_parts(tmp_path, "optimizer"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(list(tmp_path.iterdir())) > 2
    assert peak < total / 8


def test_the_first_step_after_a_load_copies_no_moment():
    layer, optimizer, parameters = build()
    step(layer, optimizer, 1)
    tensors = optimizer_tensors(optimizer, parameters)
    other, other_optimizer, other_parameters = build()
    load_optimizer_tensors(other_optimizer, other_parameters, tensors)

    def places():
        state = optimizer_tensors(other_optimizer, other_parameters)
        return {name: tensor.data_ptr() for name, tensor in state.items()}

    before = places()
    step(other, other_optimizer, 1)
    assert before == places() and len(before) == 16


def test_a_parameter_that_was_not_used_before_begins_its_moments_when_it_is():
    layer, optimizer, parameters = build()
    layer[0](paddle.ones([2, 3])).square().sum().backward()
    optimizer.step()
    optimizer.clear_grad(set_to_zero=False)
    tensors = {name: tensor.numpy() for name, tensor in optimizer_tensors(optimizer, parameters).items()}
    assert {name.split("//")[0] for name in tensors} == {"0.weight", "0.bias"}
    other, other_optimizer, other_parameters = build()
    other.set_state_dict(layer.state_dict())
    load_optimizer_tensors(other_optimizer, other_parameters, tensors)
    step(layer, optimizer, 2)
    step(other, other_optimizer, 2)
    for name, parameter in parameters.items():
        assert np.array_equal(parameter.numpy(), other_parameters[name].numpy()), name


def test_moments_that_an_earlier_version_named_after_masters_are_found():
    layer, optimizer, parameters = build()
    step(layer, optimizer, 1)
    tensors = {name: tensor.numpy() for name, tensor in optimizer_tensors(optimizer, parameters).items()}
    older = {name.replace("//", "//fp32_master_0_"): array for name, array in tensors.items()}
    other, other_optimizer, other_parameters = build()
    other.set_state_dict(layer.state_dict())
    masters = {f"{name}//master_weight": parameter.numpy() for name, parameter in parameters.items()}
    load_optimizer_tensors(other_optimizer, other_parameters, {**older, **masters})
    step(layer, optimizer, 1)
    step(other, other_optimizer, 1)
    for name, parameter in parameters.items():
        assert np.array_equal(parameter.numpy(), other_parameters[name].numpy()), name
