import ppdiffusers_train  # noqa: F401

import numpy as np
import paddle
import pytest

from ppdiffusers_train.draws import Draws, RowDraws
from ppdiffusers_train.objectives.denoising import draw_noise
from ppdiffusers_train.objectives.multires_noise import coarse_noise, enlarge

SHAPE = [2, 24, 40]


def test_enlarging_is_bilinear_with_the_borders_at_the_borders():
    row = np.float32([[[0.0, 4.0]]])
    assert enlarge(row, 1, 4).tolist() == [[[0, 1, 3, 4]]]
    assert enlarge(row.transpose(0, 2, 1), 4, 1)[0, :, 0].tolist() == [0, 1, 3, 4]
    assert np.array_equal(enlarge(row, 1, 2), row)


def test_levels_are_what_a_reader_would_write_down():
    draws = RowDraws(3, 5)
    first, second = (draws.uniform(f"multires_ratio_{level}", 2.0, 4.0) for level in (1, 2))
    sizes = [(24, 40), (int(24 / first), int(40 / first)), (int(24 / second**2), int(40 / second**2))]
    parts = [draws.normal(f"multires_noise_{level}", (2, *size)) for level, size in enumerate(sizes)]
    expected = sum(0.5**level * enlarge(part, 24, 40) for level, part in enumerate(parts))
    assert np.allclose(coarse_noise(RowDraws(3, 5), SHAPE, 0.5, 3), expected, atol=1e-6)


def test_the_level_with_one_row_is_the_last():
    draws = RowDraws(0, 0)
    coarse_noise(draws, SHAPE, 0.5, 100)
    assert len(draws.drawn) < 2 * 7, "24 rows are halved at most five times"


def test_a_sample_has_the_same_noise_in_every_batch_and_a_deviation_of_one():
    together = draw_noise(Draws(1, [4, 5, 6]), SHAPE, 0.1, 0.6).numpy()
    alone = draw_noise(Draws(1, [5]), SHAPE, 0.1, 0.6).numpy()
    assert np.array_equal(together[1], alone[0]) and not np.allclose(together[0], together[1])
    assert together.std(axis=(1, 2, 3), ddof=1) == pytest.approx(np.ones(3), abs=1e-5)
    draws, plain = Draws(1, [5]), RowDraws(1, 5)
    unscaled = plain.normal("noise", SHAPE) + 0.1 * plain.normal("noise_offset", (2, 1, 1))
    unscaled = unscaled + coarse_noise(plain, SHAPE, 0.6, 6)
    assert np.allclose(draw_noise(draws, SHAPE, 0.1, 0.6).numpy()[0], unscaled / unscaled.std(ddof=1), atol=1e-5)


def test_its_means_over_large_areas_vary_more_than_those_of_plain_noise():
    def deviation(discount):
        noise = draw_noise(Draws(0, range(50)), SHAPE, 0.0, discount)
        return float(paddle.std(noise.reshape([100, 3, 8, 5, 8]).mean([2, 4])))

    assert deviation(0.0) == pytest.approx(1 / 8, rel=0.1)
    assert deviation(0.0) < 1.5 * deviation(0.3) < deviation(0.9)
