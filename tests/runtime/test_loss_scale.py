"""The loss scale of float16, by its paper and by Paddle's own scaler."""

import pytest

from ppdiffusers_train.runtime.loss_scale import GROW_AFTER, LossScale

pytestmark = pytest.mark.once  # Paddle has no part in it


def test_an_overflow_halves_the_scale_down_to_one():
    scale = LossScale(enabled=True)
    seen = []
    while scale.can_shrink:
        seen.append(scale.value)
        scale.update(overflowed=True)
    assert seen == [2.0**power for power in range(16, 0, -1)] and scale.value == 1.0
    scale.update(overflowed=True)
    assert scale.value == 1.0


def test_steps_without_overflow_double_it_and_an_overflow_begins_their_count_anew():
    scale = LossScale(enabled=True)
    for overflowed in [*[False] * (GROW_AFTER - 1), True, *[False] * (GROW_AFTER - 1)]:
        scale.update(overflowed)
    assert scale.value == 32768.0
    scale.update(overflowed=False)
    assert scale.value == 65536.0


def test_its_state_goes_on_where_it_was_and_starts_anew_after_another_precision():
    scale, other = LossScale(enabled=True), LossScale(enabled=True)
    for overflowed in (True, False, False):
        scale.update(overflowed)
    other.load_state_dict(scale.state_dict())
    assert (other.value, other.good_steps) == (32768.0, 2)
    # As earlier versions wrote it, by Paddle's scaler.
    other.load_state_dict({"scale": [16384.0], "incr_count": 5, "decr_count": 0, "use_dynamic_loss_scaling": True})
    assert (other.value, other.good_steps) == (16384.0, 5)
    other = LossScale(enabled=True)
    other.load_state_dict(LossScale(enabled=False).state_dict())
    assert other.value == 65536.0


def test_without_float16_nothing_is_scaled():
    scale = LossScale(enabled=False)
    scale.update(overflowed=True)
    assert scale.value == 1.0 and not scale.can_shrink and scale.state_dict() == {}
