import ppdiffusers_train  # noqa: F401

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppdiffusers_train.draws import Draws, RowDraws, generator, iterate_draws

seeds = st.integers(0, 2**63 - 1)
positions = st.integers(0, 2**40)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, batch=st.lists(positions, min_size=1, max_size=5))
def test_a_batch_draws_what_its_rows_would_draw_alone(seed, batch):
    draws, rows = Draws(seed, batch), [RowDraws(seed, position) for position in batch]
    assert np.array_equal(draws.normal("noise", [2, 3]).numpy(), [row.normal("noise", [2, 3]) for row in rows])
    assert np.array_equal(draws.uniform("x", 3.0, 15.0).numpy(), [row.uniform("x", 3.0, 15.0) for row in rows])
    assert np.array_equal(
        draws.integers("timesteps", 0, 1000).numpy(), [row.integers("timesteps", 0, 1000) for row in rows]
    )
    assert np.array_equal(draws.categorical("c", [1, 2, 3]).numpy(), [row.categorical("c", [1, 2, 3]) for row in rows])


@settings(max_examples=50, deadline=None)
@given(seed=seeds, position=positions)
def test_seed_position_and_name_each_change_the_numbers(seed, position):
    one = RowDraws(seed, position).normal("noise", [4])
    assert not np.array_equal(one, RowDraws(seed ^ 1, position).normal("noise", [4]))
    assert not np.array_equal(one, RowDraws(seed, position + 1).normal("noise", [4]))
    assert not np.array_equal(one, RowDraws(seed, position).normal("other", [4]))
    assert np.array_equal(one, RowDraws(seed, position).normal("noise", [4]))


def test_types_and_shapes_are_those_of_the_contract():
    draws, row = Draws(0, [5, 6]), RowDraws(0, 5)
    assert (draws.normal("noise", [4, 1, 1]).shape, str(draws.normal("noise", []).dtype)) == (
        [2, 4, 1, 1],
        "paddle.float32",
    )
    assert str(draws.integers("t", 0, 9).dtype) == str(draws.categorical("c", [1]).dtype) == "paddle.int64"
    assert str(draws.uniform("u", 0, 1).dtype) == "paddle.float32"
    assert isinstance(row.uniform("u"), np.float32) and isinstance(row.integers("i", 0, 3), np.int64)
    assert isinstance(row.categorical("c", [1, 1]), np.int64)


def test_numbers_never_change_between_versions_of_this_project():
    row = RowDraws(seed=7, position=11)
    assert row.integers("timesteps", 0, 1000) == PINNED["integers"]
    assert row.uniform("guidance_scale", 3.0, 15.0) == pytest.approx(PINNED["uniform"], abs=1e-6)
    assert row.normal("noise", [2]).tolist() == pytest.approx(PINNED["normal"], abs=1e-6)


def test_what_happens_with_a_probability_happens_so_often_and_draws_nothing_where_that_is_none():
    rows = [RowDraws(0, position) for position in range(2000)]
    assert np.mean([row.bernoulli("drop", 0.2) for row in rows]) == pytest.approx(0.2, abs=0.03)
    still = RowDraws(0, 0)
    assert not still.bernoulli("drop", 0.0) and not still.drawn


def test_a_batch_remembers_the_whole_numbers_that_it_drew():
    draws = Draws(3, range(4))
    drawn = {"timesteps": draws.integers("timesteps", 0, 9), "weighted": draws.categorical("weighted", [1, 2, 3])}
    draws.uniform("guidance_scale")
    assert {name: values.tolist() for name, values in draws.drawn_integers.items()} == {
        name: values.tolist() for name, values in drawn.items()
    }


def test_noise_is_drawn_ahead_in_a_thread_once_it_is_known_and_is_the_same(monkeypatch):
    threads, batches = [], [[0, 1], [2, 3], [4], []]

    def seen(seed, position, name):
        threads.append((position, threading.current_thread() is threading.main_thread()))
        return generator(seed, position, name)

    expected = [Draws(3, positions).normal("noise", [4]).numpy() for positions in batches if positions]
    monkeypatch.setattr("ppdiffusers_train.draws.generator", seen)
    drawn = [draws.normal("noise", [4]).numpy() for draws in iterate_draws(3, batches) if draws.rows]
    assert all((one == other).all() for one, other in zip(drawn, expected, strict=True))
    # While the first batch is used nobody knows yet what it will ask for.
    assert sorted(threads) == [(0, True), (1, True), (2, True), (3, True), (4, False)]


def test_rows_that_are_left_keep_their_numbers():
    draws, whole = Draws(3, [5, 6, 7]), Draws(3, [5, 6, 7]).normal("noise", [2]).numpy()
    draws.keep([5, 7])
    assert (draws.normal("noise", [2]).numpy() == whole[[0, 2]]).all()


def test_distributions_are_what_their_names_say():
    draws = Draws(3, range(4000))
    normal = draws.normal("noise").numpy()
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    uniform = draws.uniform("u", 3.0, 15.0).numpy()
    assert 3 <= uniform.min() < 3.1 and 14.9 < uniform.max() < 15 and abs(uniform.mean() - 9) < 0.2
    counts = np.bincount(draws.integers("i", 0, 4).numpy(), minlength=4)
    assert counts.min() > 900 and counts.size == 4
    shares = np.bincount(draws.categorical("c", [0.0, 1.0, 3.0, 0.0]).numpy(), minlength=4) / 4000
    assert shares == pytest.approx([0, 0.25, 0.75, 0], abs=0.03) and shares[0] == shares[3] == 0


PINNED = {"integers": 650, "uniform": 14.823333, "normal": [2.8711925, -0.0097283]}
