"""Formulas and the moving average, ours against those of diffusers."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import ppdiffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from diffusers.training_utils import EMAModel, compute_snr

from ppdiffusers_train.models.stable_diffusion import with_zero_snr
from ppdiffusers_train.objectives.losses import huber_loss
from ppdiffusers_train.objectives.multires_noise import enlarge
from ppdiffusers_train.objectives.noise_schedule import add_noise, min_snr_weights, signal_to_noise_ratio, velocity
from ppdiffusers_train.runtime.ema import EMA

STEPS = np.arange(1000)
VELOCITY = {"prediction_type": "v_prediction"}


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


def test_schedules_of_zero_terminal_snr_agree(scheduler):
    ours = with_zero_snr(ppdiffusers.DDPMScheduler(**{"beta_schedule": scheduler.config.beta_schedule, **VELOCITY}))
    betas = rescale_zero_terminal_snr(scheduler.betas)
    assert np.abs(ours.alphas_cumprod.numpy() - torch.cumprod(1 - betas, dim=0).numpy()).max() < 5e-6
    for_inference = with_zero_snr(ppdiffusers.EulerDiscreteScheduler(**VELOCITY))
    theirs = DDIMScheduler(**VELOCITY, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    for side in (for_inference, theirs):
        side.set_timesteps(7)
    assert for_inference.timesteps.numpy().tolist() == theirs.timesteps.numpy().tolist()
    sample, velocity = (np.random.default_rng(seed).standard_normal([1, 2, 3], dtype=np.float32) for seed in (0, 1))
    for step in theirs.timesteps.tolist():
        expected = theirs.step(torch.from_numpy(velocity), step, torch.from_numpy(sample)).prev_sample.numpy()
        found = for_inference.step(paddle.to_tensor(velocity), step, paddle.to_tensor(sample)).prev_sample.numpy()
        assert np.abs(found - expected).max() < 1e-4  # ᾱ is rounded near 0


def test_coarse_noise_is_enlarged_as_torch_does_it():
    for size, enlarged in (((3, 5), (16, 24)), ((1, 2), (9, 7)), ((8, 8), (8, 8))):
        array = np.random.default_rng(0).standard_normal([2, *size], dtype=np.float32)
        expected = torch.nn.Upsample(enlarged, mode="bilinear")(torch.from_numpy(array)[None])[0].numpy()
        assert np.abs(enlarge(array, *enlarged) - expected).max() < 1e-5


def test_huber_losses_have_the_curve_of_torch_s_within_and_beyond_their_threshold():
    """torch's are made of a parabola and lines, ours are smooth: they agree far from the threshold."""
    errors, zero, c = np.float32([[1e-3], [50.0]]), paddle.zeros([2, 1]), paddle.full([2], 0.5)
    for is_smooth_l1, loss, factor in ((False, torch.nn.HuberLoss, 2.0), (True, torch.nn.SmoothL1Loss, 2.0)):
        argument = {"beta": 0.5} if is_smooth_l1 else {"delta": 0.5}
        expected = factor * loss(**argument)(torch.from_numpy(errors), torch.zeros(2, 1)).item()
        assert float(huber_loss(paddle.to_tensor(errors), zero, c, is_smooth_l1)) == pytest.approx(expected, rel=0.02)


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
