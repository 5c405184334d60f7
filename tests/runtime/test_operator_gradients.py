"""Every operator that a job passes on its way back has the gradient that differences of its values show."""

import ppdiffusers_train  # noqa: F401

from functools import cache

import numpy as np
import paddle
import pytest

from ppdiffusers_train.cpu import onednn
from ppdiffusers_train.cpu.patches import no_views, patched_paddle
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import Draws
from ppdiffusers_train.loop.step import set_training_mode
from tests.conftest import builder, encode, short_run
from tests.operators import OPERATORS, inputs_of, kernels_behind, output_and_gradients, wanted_gradients, weights_of

STEP = 1e-5


@cache
def differences(name) -> dict:
    """The gradients for all inputs of an operator, by central differences of its values in float64."""
    function, _ = OPERATORS[name]
    arrays, gradients = inputs_of(name), {}

    def weighted_sum():
        y = function(**{key: paddle.to_tensor(array) for key, array in arrays.items()}).numpy()
        return (y * weights_of(y.shape)).sum()

    for key, array in arrays.items():
        gradients[key] = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            value = array[place]
            array[place] = value + STEP
            above = weighted_sum()
            array[place] = value - STEP
            gradients[key][place] = (above - weighted_sum()) / (2 * STEP)
            array[place] = value
    return gradients


def assert_right(name, wanted):
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-7)):
        _, gradients = output_and_gradients(name, wanted, dtype)
        assert {key for key, gradient in gradients.items() if gradient is not None} == set(wanted)
        for key in wanted:
            expected = differences(name)[key]
            assert np.abs(gradients[key] - expected).max() < tolerance * np.abs(expected).max(), (dtype, key)


CASES = [
    pytest.param(name, wanted, id=f"{name}: {', '.join(wanted)}")
    for name in OPERATORS
    for wanted in wanted_gradients(name)
]


@pytest.mark.parametrize("name, wanted", CASES)
def test_gradients_are_right_whichever_are_asked_for(name, wanted):
    assert_right(name, wanted)


@pytest.mark.parametrize("name, wanted", CASES)
def test_so_they_are_with_what_makes_processors_faster(name, wanted, monkeypatch):
    monkeypatch.setattr(onednn, "LEAST_PLACES", 0)
    monkeypatch.setattr(onednn, "LEAST_OPERATIONS", 0)
    with patched_paddle(), no_views():
        assert_right(name, wanted)


@pytest.mark.xfail(strict=True, reason="what it does not ask for, its kernels are not asked for either")
@pytest.mark.parametrize("is_trained", [True, False])
def test_paddle_grad_passes_layer_norms_with_weights(is_trained):
    """Nothing here takes gradients by `paddle.grad`."""
    x, weight = paddle.rand([2, 6]), paddle.rand([6])
    x.stop_gradient, weight.stop_gradient = False, not is_trained
    y = paddle.nn.functional.layer_norm(x, 6, weight).square().sum()
    (gradient,) = paddle.grad(y, [x], retain_graph=True)
    y.backward()
    assert np.allclose(gradient.numpy(), x.grad.numpy(), rtol=1e-5)


@pytest.fixture
def build_lcm_module(lcm_jobs, sd, photos):
    return builder(lcm_jobs, [f"--pretrained_teacher_model={sd}", *short_run(photos)])


def test_no_job_passes_an_operator_that_is_not_tested(build, build_sdxl_module, build_sd3_module, build_lcm_module):
    tested = set().union(
        *(kernels_behind(output_and_gradients(name, wanted_gradients(name)[-1])[0]) for name in OPERATORS)
    )
    for module in (
        build("decoder"), build("prior"), build_sdxl_module("lora_sdxl", "--train_text_encoder"),
        build_sd3_module("sd3"), build_lcm_module("sd"),
    ):  # fmt: skip
        set_training_mode(module)
        loss = module(encode(module, build_dataset(module.args), [0, 1]), Draws(0, [0, 1]))
        missing = kernels_behind(loss) - tested
        assert not missing, f"{type(module).__name__}: give tests/operators.py a case of {missing}"
