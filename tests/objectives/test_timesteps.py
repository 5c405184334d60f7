import numpy as np
import pytest

from ppdiffusers_train.objectives.timesteps import timestep_weights


@pytest.mark.parametrize(
    "strategy, expected",
    [
        ("earlier", [3, 3, 1, 1, 1, 1, 1, 1]),
        ("later", [1, 1, 1, 1, 1, 1, 3, 3]),
        ("range", [1, 1, 1, 3, 3, 1, 1, 1]),
    ],
)
def test_the_biased_timesteps_are_three_times_as_likely(strategy, expected):
    weights = timestep_weights(strategy, 8, multiplier=3.0, portion=0.25, begin=3, end=5)
    assert weights == pytest.approx(np.array(expected) / sum(expected))


def test_without_a_strategy_all_are_alike():
    assert timestep_weights("none", 8, 3.0, 0.25, 3, 5) is None


def test_a_multiplier_below_one_makes_them_rarer_and_the_whole_portion_changes_nothing():
    assert timestep_weights("earlier", 4, 0.5, 0.5, 0, 0) == pytest.approx(np.array([1, 1, 2, 2]) / 6)
    assert timestep_weights("later", 4, 9.0, 1.0, 0, 0) == pytest.approx(np.full(4, 0.25))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"multiplier": 0.0}, "timestep_bias_multiplier: 0 is not above 0"),
        ({"multiplier": -1.0}, "timestep_bias_multiplier: -1 is not above 0"),
        ({"portion": 0.0}, "timestep_bias_portion: 0 of 8 timesteps are 0"),
        ({"portion": 1.5}, "timestep_bias_portion: 1.5 of 8 timesteps are 12"),
        ({"strategy": "range", "begin": -1}, "timestep_bias_begin, timestep_bias_end: -1 and 5 are no range"),
        ({"strategy": "range", "end": 9}, "expected 0 <= begin < end <= 8"),
        ({"strategy": "range", "begin": 5}, "5 and 5 are no range"),
    ],
)
def test_impossible_values_are_named(changed, message):
    values = {"strategy": "later", "count": 8, "multiplier": 2.0, "portion": 0.25, "begin": 3, "end": 5, **changed}
    with pytest.raises(ValueError, match=message):
        timestep_weights(**values)
