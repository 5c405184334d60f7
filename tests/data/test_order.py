import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppdiffusers_train.data.order import SampleOrder, micro_batches

pytestmark = pytest.mark.once  # no Paddle in it

sizes = st.integers(1, 40)


def take_epoch(order, samples_per_step, position=0):
    """The windows of the epoch that begins at `position`."""
    windows = []
    for window in order.windows(position, samples_per_step):
        windows.append(window)
        if window.stop % order.size == 0:
            return windows


@given(seed=st.integers(0, 2**63 - 1), size=sizes, epoch=st.integers(0, 5))
def test_every_row_comes_once_per_epoch(seed, size, epoch):
    order = SampleOrder(seed, size)
    assert sorted(order.row(epoch * size + offset) for offset in range(size)) == list(range(size))


@given(size=sizes, samples_per_step=st.integers(1, 50))
def test_windows_tile_an_epoch_and_only_the_last_is_short(size, samples_per_step):
    order = SampleOrder(0, size)
    windows = take_epoch(order, samples_per_step)
    assert [position for window in windows for position in window] == list(range(size))
    assert all(len(window) == samples_per_step for window in windows[:-1])
    assert len(windows) == order.steps_per_epoch(samples_per_step) == math.ceil(size / samples_per_step)


@given(size=sizes, first=st.integers(1, 50), then=st.integers(1, 50), steps=st.integers(0, 9), epochs=st.integers(1, 4))
def test_steps_until_the_end_of_an_epoch_are_those_that_windows_give(size, first, then, steps, epochs):
    """Also when a step had another number of samples before a resume."""
    order = SampleOrder(0, size)
    position = [0, *(window.stop for _, window in zip(range(steps), order.windows(0, first)))][-1]
    counted = 0
    for window in order.windows(position, then):
        if window.start >= epochs * size:
            break
        counted += 1
    assert order.steps_until(epochs, position, then) == counted


@given(size=sizes, samples_per_step=st.integers(1, 20), steps=st.integers(0, 10))
def test_windows_go_on_from_any_step_as_if_nothing_had_happened(size, samples_per_step, steps):
    order = SampleOrder(0, size)
    whole = [window for _, window in zip(range(steps + 3), order.windows(0, samples_per_step))]
    position = whole[steps - 1].stop if steps else 0
    resumed = [window for _, window in zip(range(3), order.windows(position, samples_per_step))]
    assert resumed == whole[steps:]


@given(size=st.integers(1, 30), world_size=st.integers(1, 5), batch_size=st.integers(1, 8))
def test_ranks_share_a_window_disjointly_and_completely(size, world_size, batch_size):
    window = range(100, 100 + size)
    shares = [micro_batches(window, rank, world_size, batch_size) for rank in range(world_size)]
    counts = [sum(map(len, share)) for share in shares]
    assert sorted(position for share in shares for batch in share for position in batch) == list(window)
    assert max(counts) - min(counts) <= 1
    assert all(len(batch) <= batch_size for share in shares for batch in share)


def test_epochs_and_seeds_differ_in_order():
    order = [SampleOrder(seed, 30) for seed in (0, 1)]
    first, second = ([order[0].row(epoch * 30 + i) for i in range(30)] for epoch in (0, 1))
    assert first != second and first != [order[1].row(i) for i in range(30)]
