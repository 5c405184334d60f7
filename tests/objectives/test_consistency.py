import ppdiffusers_train  # noqa: F401

import math

import numpy as np
import paddle
import pytest
from ppdiffusers import DDIMScheduler, LCMScheduler

from ppdiffusers_train.objectives.consistency import (
    apply_guidance,
    boundary_scalings,
    consistency_function,
    ddim_step,
    ddim_timesteps,
    guidance_embedding,
    sample_and_noise,
)
from ppdiffusers_train.objectives.losses import pseudo_huber_loss
from ppdiffusers_train.objectives.noise_schedule import add_noise, velocity

SCHEDULER = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False)
SCHEDULE = SCHEDULER.alphas_cumprod
TIMES = paddle.to_tensor([3, 500, 999])


def random(*shape):
    return paddle.to_tensor(np.random.default_rng(len(shape)).standard_normal(shape, dtype=np.float32))


def test_at_time_zero_the_function_is_the_identity():
    noisy, sample = random(3, 4, 2, 2), 100 * random(3, 4, 2, 2)
    answer = consistency_function(noisy, sample, paddle.zeros([3], "int64"), 10.0)
    assert np.array_equal(answer.numpy(), noisy.numpy())


def test_scalings_are_those_of_the_inference_scheduler_and_the_hand():
    skip, out = boundary_scalings(TIMES, 10.0)
    assert skip.numpy() == pytest.approx([0.25 / (t * t * 100 + 0.25) for t in (3, 500, 999)], rel=1e-6)
    scheduler = LCMScheduler(timestep_scaling=10.0)
    for index, timestep in enumerate(TIMES.tolist()):
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        assert [float(skip[index]), float(out[index])] == pytest.approx([float(value) for value in theirs], rel=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_gives_back_what_was_mixed(kind):
    sample, noise = random(3, 4, 2, 2), -random(3, 4, 2, 2) + 0.5
    noisy = add_noise(SCHEDULE, sample, noise, TIMES)
    prediction = {"epsilon": noise, "v_prediction": velocity(SCHEDULE, sample, noise, TIMES), "sample": sample}[kind]
    found = sample_and_noise(kind, SCHEDULE, prediction, noisy, TIMES)
    for one, other in zip(found, (sample, noise)):
        assert np.allclose(one.numpy(), other.numpy(), atol=2e-4)
    with pytest.raises(ValueError, match="'x' is none of epsilon, v_prediction, sample"):
        sample_and_noise("x", SCHEDULE, prediction, noisy, TIMES)


def test_guidance_is_the_pipelines_scale_less_one():
    conditional, unconditional, scale = random(2, 3), 2 * random(2, 3) + 1, 7.5
    ours = apply_guidance(conditional, unconditional, paddle.to_tensor([scale - 1, 0.0]))
    assert np.allclose(ours[0].numpy(), (unconditional + scale * (conditional - unconditional))[0].numpy(), atol=1e-5)
    assert np.array_equal(ours[1].numpy(), conditional[1].numpy())


def test_the_solver_s_timesteps():
    assert ddim_timesteps(1000, 50)[[0, 1, 49]].tolist() == [19, 39, 999]
    assert ddim_timesteps(1000, 30)[[0, 29]].tolist() == [32, 989]


def test_the_solver_steps_as_the_ddim_scheduler_does_from_each_of_its_timesteps():
    steps = ddim_timesteps(1000, 50)
    SCHEDULER.set_timesteps(50)
    for index in (0, 1, 30, 49):
        time = int(steps[index])
        noisy, noise = random(1, 4, 2, 2), random(1, 4, 2)[..., None] + paddle.zeros([1, 4, 2, 2])
        times = paddle.to_tensor([time])
        sample, _ = sample_and_noise("epsilon", SCHEDULE, noise, noisy, times)
        ours = ddim_step(SCHEDULE, paddle.to_tensor(steps), paddle.to_tensor([index]), sample, noise)
        scheduler = DDIMScheduler.from_config(SCHEDULER.config, clip_sample=False)
        scheduler.set_timesteps(50)
        theirs = scheduler.step(noise, time, noisy).prev_sample
        assert np.allclose(ours.numpy(), theirs.numpy(), atol=1e-5), index


def test_the_guidance_embedding_by_hand():
    embedding = guidance_embedding(paddle.to_tensor([0.002, 1.0]), 6).numpy()
    angles = [1000 * 0.002 * math.exp(-math.log(10000) * j / 2) for j in range(3)]
    assert embedding[0] == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=1e-5)
    odd = guidance_embedding(paddle.to_tensor([0.5]), 7)
    assert odd.shape == [1, 7] and float(odd[0, 6]) == 0


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    near, far = paddle.full([2, 3], 1e-4), paddle.full([2, 3], 50.0)
    zero = paddle.zeros([2, 3])
    assert float(pseudo_huber_loss(near, zero, 0.01)) == pytest.approx(1e-8 / 0.02, rel=1e-2)
    assert float(pseudo_huber_loss(far, zero, 0.001)) == pytest.approx(49.999, rel=1e-6)
