import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.nn import functional
from paddle.nn.functional.activation import silu as unrepaired_silu

from ppdiffusers_train.runtime.silu import repair_silu, silu_gradient_is_broken

NUMBERS = np.concatenate([np.linspace(-79, 20, 500), np.linspace(-90, -80, 100), [-1e30, -1e4]]).astype("float32")


@pytest.fixture(autouse=True)
def unrepaired(monkeypatch):
    monkeypatch.setattr(functional, "silu", unrepaired_silu)


def value_and_gradient():
    x = paddle.to_tensor(NUMBERS)
    x.stop_gradient = False
    y = nn.Silu()(x)
    y.sum().backward()
    return y.numpy(), x.grad.numpy()


def test_the_repair_can_go_when_paddle_has_mended_its_gradient():
    assert silu_gradient_is_broken(), "drop runtime/silu.py"


def test_the_repair_changes_nothing_but_the_nan():
    values, gradients = value_and_gradient()
    repair_silu()
    repaired_values, repaired_gradients = value_and_gradient()
    assert not np.isfinite(gradients).all() and np.isfinite(repaired_gradients).all()
    # Paddle 2.6 rounds by where a number lies in memory.
    assert np.allclose(repaired_values[:500], values[:500], rtol=1e-6, atol=0)
    assert np.allclose(repaired_gradients[:500], gradients[:500], rtol=1e-6, atol=1e-38)
    assert np.abs(repaired_values[500:]).max() < 1e-30 and np.abs(repaired_gradients[500:]).max() < 1e-30


def test_the_repair_is_made_once():
    repair_silu()
    repaired = functional.silu
    repair_silu()
    assert functional.silu is repaired and not silu_gradient_is_broken()
