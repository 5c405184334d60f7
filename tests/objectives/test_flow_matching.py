"""Rectified flow's formulas, against values by hand and against the library's scheduler."""

import ppdiffusers_train  # noqa: F401

import math

import numpy as np
import paddle
import pytest
from ppdiffusers import FlowMatchEulerDiscreteScheduler

from ppdiffusers_train.objectives.flow_matching import (
    LARGEST_MODE_SCALE,
    bell_weights,
    interpolate,
    shifted_sigmas,
    timestep_density,
    velocity,
)

T = 1000


def cumulative(density, time):
    """P(t below `time`) of a density over the table, which begins at t = 1."""
    return density[round(T * (1 - time)) :].sum()


def test_half_way_is_half_noise_and_the_velocity_leads_from_image_to_noise():
    sample, noise = paddle.full([2, 3, 1, 1], 2.0), paddle.full([2, 3, 1, 1], -4.0)
    x = interpolate(sample, noise, paddle.to_tensor([0.5, 0.25]))
    assert x[0].flatten().tolist() == [-1.0] * 3 and x[1].flatten().tolist() == [0.5] * 3
    assert velocity(sample, noise).flatten().tolist() == [-6.0] * 6
    begin, later = (interpolate(sample, noise, paddle.full([2], sigma)) for sigma in (0.25, 0.75))
    assert np.allclose(((later - begin) / 0.5).numpy(), velocity(sample, noise).numpy()), "dx/dσ"


def test_a_shift_of_three_puts_the_middle_at_three_quarters():
    sigmas = shifted_sigmas(T, 3.0)
    assert sigmas[0] == 1 and sigmas[T // 2] == pytest.approx(0.75)
    assert sigmas[-1] == pytest.approx(3 * 0.001 / (1 + 2 * 0.001))
    assert np.allclose(shifted_sigmas(4, 1.0), [1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_table_and_noising_are_those_of_the_scheduler(shift):
    scheduler, sigmas = FlowMatchEulerDiscreteScheduler(shift=shift), shifted_sigmas(T, shift)
    assert np.abs(scheduler.sigmas.numpy() - sigmas).max() < 2e-7  # two roundings of float32
    assert np.abs(scheduler.timesteps.numpy() - T * sigmas).max() < 2e-4
    sample, noise = paddle.randn([1, 4, 2, 2]), paddle.randn([1, 4, 2, 2])
    for index in (0, 10, 500, 999):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        theirs = scheduler.scale_noise(sample, scheduler.timesteps[index], noise)
        ours = interpolate(sample, noise, paddle.to_tensor(sigmas[index : index + 1]))
        assert np.abs((theirs - ours).numpy()).max() < 1e-6


def test_the_true_velocity_leads_the_scheduler_back_to_the_image():
    scheduler, sample, noise = FlowMatchEulerDiscreteScheduler(shift=3.0), paddle.randn([1, 4, 2, 2]), paddle.randn([4])
    scheduler.set_timesteps(7)
    x = noise = noise.reshape([1, 4, 1, 1]).expand([1, 4, 2, 2])
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(sample, noise), timestep, x).prev_sample
    assert np.abs((x - sample).numpy()).max() < 1e-5


def test_uniform_means_every_timestep_alike_and_boundaries_cut_the_table():
    assert np.allclose(timestep_density("uniform", T), 1 / T)
    noisy = timestep_density("uniform", T, 0, 0.25)
    assert np.allclose(noisy[:250], 1 / 250) and not noisy[250:].any(), "0 is where denoising begins"
    part = timestep_density("logit-normal", T, 0.2, 0.7)
    whole = timestep_density("logit-normal", T)
    assert part.sum() == pytest.approx(1) and not part[:200].any() and not part[700:].any()
    assert np.allclose(part[200:700] / whole[200:700], part[300] / whole[300]), "the shape stays"


def test_the_logit_of_a_logit_normal_time_is_normal():
    density = timestep_density("logit-normal", T)
    for deviations in (-2, -1, 0, 1):
        time = round(T / (1 + math.exp(-deviations))) / T
        logit = math.log(time / (1 - time))
        assert cumulative(density, time) == pytest.approx(0.5 * math.erfc(-logit / math.sqrt(2)), abs=1e-9)
    narrow = timestep_density("logit-normal", T, logit_mean=1.0, logit_std=0.5)
    median = 1 / (1 + math.exp(-1.0))
    assert cumulative(narrow, round(median, 3)) == pytest.approx(0.5, abs=1e-3), "a mean above 0 prefers noise"
    assert cumulative(timestep_density("logit-normal", T, logit_std=0.05), 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, LARGEST_MODE_SCALE])
def test_the_mode_density_is_that_of_its_mapping_of_uniform_numbers(scale):
    u = (np.arange(200_000) + 0.5) / 200_000
    times = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    density = timestep_density("mode", T, mode_scale=scale)
    assert density.sum() == pytest.approx(1) and (density >= 0).all()
    for time in np.arange(0.05, 1, 0.05):
        assert cumulative(density, time) == pytest.approx((times < time).mean(), abs=2e-5)
    assert np.allclose(timestep_density("mode", T, mode_scale=0.0), 1 / T)


def test_a_mode_without_scale_is_the_papers_best():
    assert np.array_equal(timestep_density("mode", T), timestep_density("mode", T, mode_scale=1.29))


def test_drawn_timesteps_follow_the_density():
    from ppdiffusers_train.draws import Draws

    density = timestep_density("logit-normal", T)
    drawn = Draws(0, range(4000)).categorical("timesteps", density).numpy()
    for time in (0.25, 0.5, 0.75):
        assert (drawn >= T * (1 - time)).mean() == pytest.approx(cumulative(density, time), abs=0.02)


def test_bell_weights_by_hand():
    weights = bell_weights(T * shifted_sigmas(T, 1.0), T)
    bell = [math.exp(-2 * (t / 1000 - 0.5) ** 2) - math.exp(-0.5) for t in range(1000, 0, -1)]
    assert np.allclose(weights, np.array(bell) / np.mean(bell), atol=1e-5)
    assert weights.mean() == pytest.approx(1) and weights.argmax() == 500 and weights.min() == weights[0] == 0
    shifted = bell_weights(T * shifted_sigmas(T, 3.0), T)
    assert shifted.mean() == pytest.approx(1, rel=1e-5) and shifted.argmax() == 750, "σ = 1/2 is at t = 1/4"


@pytest.mark.parametrize(
    "options, message",
    [
        (("uniform", T, 0.5, 0.5), "leave no timestep of 1000; expected 0 <= min < max <= 1"),
        (("uniform", T, 0.0, 1.1), "0 and 1.1 leave no timestep"),
        (("logit-normal", T, 0, 1, 0, 0), "logit_std: 0 is not above 0"),
        (("logit-normal", T, 0, 0.1, -40), "logit-normal has no weight there"),
        (("mode", T, 0, 1, 0, 1, 2), "mode_scale: 2 is not from -1 to 1.7519"),
        (("mode", T, 0, 1, 0, 1, -1.1), "mode_scale: -1.1 is not from -1"),
        (("sigma", T), "none of uniform, logit-normal, mode"),
    ],
)
def test_parameters_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        timestep_density(*options)
