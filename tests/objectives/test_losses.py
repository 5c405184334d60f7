import ppdiffusers_train  # noqa: F401

import paddle
import pytest

from ppdiffusers_train.objectives.losses import mse_loss

PREDICTION = paddle.to_tensor([[[1.0, 2.0]], [[3.0, 5.0]]])
TARGET = paddle.to_tensor([[[0.0, 0.0]], [[3.0, 3.0]]])


def test_loss_is_the_mean_of_each_samples_mean_square():
    assert float(mse_loss(PREDICTION, TARGET)) == pytest.approx(((1 + 4) / 2 + 4 / 2) / 2)


def test_a_weight_belongs_to_its_own_sample():
    assert float(mse_loss(PREDICTION, TARGET, paddle.to_tensor([0.0, 3.0]))) == pytest.approx(3 * 2 / 2)


def test_loss_is_computed_in_float32():
    loss = mse_loss(PREDICTION.astype("float64"), TARGET.astype("float64"))
    assert loss.dtype == paddle.float32
