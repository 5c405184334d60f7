import ppdiffusers_train  # noqa: F401

import paddle
import pytest
from paddle import nn

from ppdiffusers_train.runtime.ema import EMA, ema_decay


def test_decay_grows_from_zero_to_its_bound():
    assert [ema_decay(update) for update in (1, 2, 3)] == pytest.approx([0, 2 / 11, 3 / 12])
    assert ema_decay(10**9) == 0.9999
    assert ema_decay(50, max_decay=0.5) == 0.5


def follow(values):
    layer = nn.Linear(1, 1, bias_attr=False)
    ema = EMA(dict(layer.named_parameters()))
    for value in values:
        layer.weight.set_value(paddle.full([1, 1], value))
        ema.update()
    return layer, ema


def test_the_average_follows_the_weights_by_hand():
    _, ema = follow([5.0, 16.0, 4.0])
    after_two = 2 / 11 * 5 + 9 / 11 * 16
    assert float(ema.averages["weight"]) == pytest.approx(0.25 * after_two + 0.75 * 4)


def test_applied_shows_the_averages_and_gives_the_weights_back_even_after_an_error():
    layer, ema = follow([5.0, 16.0])
    with pytest.raises(KeyError):
        with ema.applied():
            assert float(layer.weight) == float(ema.averages["weight"]) != 16
            raise KeyError
    assert float(layer.weight) == 16


def test_where_the_optimizer_keeps_a_better_copy_the_average_follows_that():
    layer = nn.Linear(1, 1, bias_attr=False)
    ema = EMA(dict(layer.named_parameters()))
    ema.update([("weight", paddle.full([1, 1], 1.0009765625))])  # float16 and bfloat16 would round it
    assert float(ema.averages["weight"]) == 1.0009765625 and ema.averages["weight"].dtype == paddle.float32
