"""Formulas and the moving average, ours against those of diffusers."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel, compute_snr

from ppdiffusers_train.objectives.noise_schedule import add_noise, min_snr_weights, signal_to_noise_ratio, velocity
from ppdiffusers_train.runtime.ema import EMA

STEPS = np.arange(1000)


@pytest.fixture(params=["linear", "scaled_linear", "squaredcos_cap_v2"])
def scheduler(request):
    return DDPMScheduler(beta_schedule=request.param)


def both(random):
    """The same normal numbers for both sides."""
    array = random.standard_normal((1000, 2, 3), dtype=np.float32)
    return paddle.to_tensor(array), torch.from_numpy(array)


def test_noise_and_velocity_agree_at_every_timestep(scheduler):
    random = np.random.default_rng(0)
    (sample, torch_sample), (noise, torch_noise) = both(random), both(random)
    schedule = paddle.to_tensor(scheduler.alphas_cumprod.numpy())
    for ours, reference in ((add_noise, scheduler.add_noise), (velocity, scheduler.get_velocity)):
        expected = reference(torch_sample, torch_noise, torch.from_numpy(STEPS)).numpy()
        assert np.abs(ours(schedule, sample, noise, paddle.to_tensor(STEPS)).numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_agree_at_every_timestep(scheduler, prediction_type):
    schedule = paddle.to_tensor(scheduler.alphas_cumprod.numpy())
    snr = compute_snr(scheduler, torch.from_numpy(STEPS))
    clipped = torch.clamp(snr, max=5.0)
    expected = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction_type]
    ours = min_snr_weights(signal_to_noise_ratio(schedule, paddle.to_tensor(STEPS)), 5.0, prediction_type)
    assert ours.numpy() == pytest.approx(expected.numpy(), rel=1e-5)


def test_the_moving_average_agrees():
    ours, reference = paddle.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    random = np.random.default_rng(0)

    def set_weights():
        weight, bias = random.standard_normal((3, 2), dtype=np.float32), random.standard_normal(2, dtype=np.float32)
        ours.weight.set_value(weight)
        ours.bias.set_value(bias)
        with torch.no_grad():
            reference.weight.copy_(torch.from_numpy(weight.T))
            reference.bias.copy_(torch.from_numpy(bias))

    set_weights()
    ema, torch_ema = EMA(dict(ours.named_parameters())), EMAModel(reference.parameters())
    for _ in range(15):
        set_weights()
        ema.update()
        torch_ema.step(reference.parameters())
    weight, bias = (average.detach().numpy() for average in torch_ema.shadow_params)
    assert np.abs(ema.averages["weight"].numpy() - weight.T).max() < 1e-6
    assert np.abs(ema.averages["bias"].numpy() - bias).max() < 1e-6
