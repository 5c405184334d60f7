import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest

from ppdiffusers_train.objectives.noise_schedule import (
    add_noise,
    debiased_weights,
    epsilon_like_weights,
    huber_thresholds,
    min_snr_weights,
    offset_noise,
    signal_to_noise_ratio,
    training_target,
    velocity,
)

# ᾱ of 0.64 and 0.36: the square roots are 0.8 and 0.6 either way round.
SCHEDULE = paddle.to_tensor([0.64, 0.36, 1.0, 0.0])
SAMPLE, NOISE = paddle.full([2, 1, 2, 2], 10.0), paddle.full([2, 1, 2, 2], 1.0)
STEPS = paddle.to_tensor([0, 1])


def per_sample(tensor):
    """The one value that each sample of a constant batch holds."""
    return tensor.numpy().reshape(tensor.shape[0], -1)[:, 0]


def test_noisy_samples_mix_signal_and_noise_by_the_square_roots_of_alpha():
    assert per_sample(add_noise(SCHEDULE, SAMPLE, NOISE, STEPS)) == pytest.approx([8.6, 6.8])


def test_velocity_is_the_mix_at_a_right_angle():
    assert per_sample(velocity(SCHEDULE, SAMPLE, NOISE, STEPS)) == pytest.approx([0.8 - 6.0, 0.6 - 8.0])


@pytest.mark.parametrize(
    "prediction_type, expected", [("epsilon", [1, 1]), ("sample", [10, 10]), ("v_prediction", [-5.2, -7.4])]
)
def test_each_prediction_type_has_its_target(prediction_type, expected):
    assert per_sample(training_target(prediction_type, SCHEDULE, SAMPLE, NOISE, STEPS)) == pytest.approx(expected)


def test_an_unknown_prediction_type_is_refused():
    for call in (
        lambda: training_target("flow", SCHEDULE, SAMPLE, NOISE, STEPS),
        lambda: min_snr_weights(paddle.ones([1]), 5.0, "flow"),
    ):
        with pytest.raises(ValueError, match="'flow' is none of epsilon, v_prediction, sample"):
            call()


def test_signal_to_noise_ratio_by_hand():
    assert signal_to_noise_ratio(SCHEDULE, STEPS).tolist() == pytest.approx([0.64 / 0.36, 0.36 / 0.64])


@pytest.mark.parametrize(
    "prediction_type, expected",
    [
        ("epsilon", [0.05, 1.0, 1.0]),
        ("v_prediction", [5 / 101, 2 / 3, 0.01 / 1.01]),
        ("sample", [5.0, 2.0, 0.01]),
    ],
)
def test_min_snr_weights_by_hand_each_sample_with_its_own_snr(prediction_type, expected):
    weights = min_snr_weights(paddle.to_tensor([100.0, 2.0, 0.01]), 5.0, prediction_type)
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "prediction_type, expected", [("epsilon", [1, 0]), ("v_prediction", [0, 0]), ("sample", [0, 5])]
)
def test_min_snr_weights_are_numbers_at_snr_zero_and_infinity(prediction_type, expected):
    snr = signal_to_noise_ratio(SCHEDULE, paddle.to_tensor([3, 2]))
    assert snr.tolist() == [0.0, np.inf]
    assert min_snr_weights(snr, 5.0, prediction_type).tolist() == expected


@pytest.mark.parametrize(
    "prediction_type, expected",
    [
        ("epsilon", [1 / np.sqrt(1000), 0.5, 2.0]),
        ("v_prediction", [1 / 1001, 1 / 5, 1 / 1.25]),
        ("sample", [np.sqrt(1000), 2.0, 0.5]),
    ],
)
def test_debiased_weights_by_hand_with_snr_at_most_1000(prediction_type, expected):
    weights = debiased_weights(paddle.to_tensor([np.inf, 4.0, 0.25], "float32"), prediction_type)
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_loss_of_velocity_is_scaled_to_that_of_the_noise():
    assert epsilon_like_weights(paddle.to_tensor([np.inf, 4.0, 0.0], "float32")).tolist() == pytest.approx(
        [1000 / 1001, 0.8, 0.0], rel=1e-6
    )
    alpha, error = 0.64, 0.1  # what is wrong in v is wrong in epsilon = √ᾱ · v + √(1 - ᾱ) · x_t by √ᾱ as much
    snr = signal_to_noise_ratio(SCHEDULE, STEPS)[:1]
    assert error**2 * float(epsilon_like_weights(snr)) == pytest.approx(alpha * error**2)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.1] * 4),
        ("exponential", [1.0, 0.1**0.25, 0.1**0.5, 0.1**0.75]),  # of four timesteps
        ("snr", [0.1 + 0.9 / 1.75**2, 0.1 + 0.9 / (1 + 4 / 3) ** 2, 1.0, 0.1]),  # σ is 3/4, 4/3, 0, inf
    ],
)
def test_thresholds_of_the_huber_loss_by_hand(schedule, expected):
    thresholds = huber_thresholds(schedule, 0.1, SCHEDULE, paddle.arange(4))
    assert thresholds.tolist() == pytest.approx(expected, rel=1e-5)


def test_offset_noise_moves_each_channel_by_its_own_offset():
    noise = offset_noise(paddle.zeros([1, 2, 2, 2]), paddle.to_tensor([1.0, -2.0]).reshape([1, 2, 1, 1]), 0.5)
    assert noise.numpy()[0, 0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert noise.numpy()[0, 1].tolist() == [[-1.0, -1.0], [-1.0, -1.0]]
