import ppdiffusers_train  # noqa: F401

import paddle
import pytest

from ppdiffusers_train.objectives.losses import huber_loss, mse_loss, pseudo_huber_loss

PREDICTION = paddle.to_tensor([[[1.0, 2.0]], [[3.0, 5.0]]])
C = [0.5, 0.1]
TARGET = paddle.to_tensor([[[0.0, 0.0]], [[3.0, 3.0]]])


def test_loss_is_the_mean_of_each_samples_mean_square():
    assert float(mse_loss(PREDICTION, TARGET)) == pytest.approx(((1 + 4) / 2 + 4 / 2) / 2)


def test_a_weight_belongs_to_its_own_sample():
    assert float(mse_loss(PREDICTION, TARGET, paddle.to_tensor([0.0, 3.0]))) == pytest.approx(3 * 2 / 2)


def test_loss_is_computed_in_float32():
    loss = mse_loss(PREDICTION.astype("float64"), TARGET.astype("float64"))
    assert loss.dtype == paddle.float32


@pytest.mark.parametrize("is_smooth_l1", [False, True])
def test_huber_losses_by_hand_each_sample_with_its_own_threshold(is_smooth_l1):
    errors = [[1.0, 2.0], [0.0, 2.0]]
    roots = [[((e**2 + c**2) ** 0.5 - c) * (2 if is_smooth_l1 else 2 * c) for e in row] for row, c in zip(errors, C)]
    expected = sum(weight * sum(row) / 2 for weight, row in zip([1.0, 3.0], roots)) / 2
    weights = paddle.to_tensor([1.0, 3.0])
    loss = huber_loss(PREDICTION, TARGET, paddle.to_tensor(C), is_smooth_l1, weights)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_huber_is_the_squared_error_below_its_threshold_and_smooth_l1_the_absolute_one_above():
    assert float(huber_loss(PREDICTION, TARGET, paddle.full([2], 500.0), False)) == pytest.approx(2.25, rel=1e-3)
    assert float(huber_loss(PREDICTION, TARGET, paddle.full([2], 1e-4), True)) == pytest.approx(2.5, rel=1e-3)
    plain = pseudo_huber_loss(PREDICTION, TARGET, 0.3)
    assert float(huber_loss(PREDICTION, TARGET, paddle.full([2], 0.3), True)) == pytest.approx(2 * float(plain))
