import ppdiffusers_train  # noqa: F401

import threading

import numpy as np
import pytest
from PIL import Image

from ppdiffusers_train.data.loader import PreprocessedSamples, iterate_batches
from ppdiffusers_train.data.order import SampleOrder
from ppdiffusers_train.errors import BadSampleError

pytestmark = pytest.mark.once  # no Paddle in it


class Rows:
    """Six rows whose images are as wide as their number; row 4 may be broken."""

    def __init__(self, broken=None):
        self.broken = broken

    def __getitem__(self, index):
        if index == self.broken:
            raise BadSampleError(f"row {index}: broken")
        return {"image": Image.new("RGB", (index + 1, 1)), "caption": ["a", "b", "c"]}


def preprocess(row, draws):
    return {"width": np.int64(row["image"].width), "choice": np.int64(ord(row["caption"])), "u": draws.uniform("u")}


def load(num_workers, broken=None):
    order = SampleOrder(3, 6)
    batches = [range(0, 2), range(2, 5), range(5, 6), range(6, 9)]
    samples = PreprocessedSamples(Rows(broken), preprocess, order)
    return order, [batch for batch, errors in iterate_batches(samples, batches, num_workers)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_with_the_rows_of_their_positions(num_workers):
    order, batches = load(num_workers)
    widths = [batch["width"].tolist() for batch in batches]
    assert [len(batch) for batch in widths] == [2, 3, 1, 3]
    assert sum(widths, []) == [order.row(position) + 1 for position in range(9)]


def test_workers_change_no_number():
    for alone, shared in zip(load(0)[1], load(2)[1]):
        assert all(np.array_equal(alone[name].numpy(), shared[name].numpy()) for name in alone)


def test_one_of_several_captions_is_drawn_for_each_position():
    choices = sum((batch["choice"].tolist() for batch in load(0)[1]), [])
    assert {chr(choice) for choice in choices} <= set("abc") and len(set(choices)) > 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_is_left_out_and_told_with_its_own_message(num_workers):
    order = SampleOrder(3, 6)
    samples = PreprocessedSamples(Rows(broken=4), preprocess, order)
    loaded = list(iterate_batches(samples, [[position] for position in range(6)] + [range(6, 12)], num_workers))
    assert [batch for batch, errors in loaded if errors][0] == {}
    for positions, (batch, errors) in zip([[p] for p in range(6)] + [range(6, 12)], loaded):
        bad = {i: "row 4: broken" for i, position in enumerate(positions) if order.row(position) == 4}
        assert errors == bad
        good = [order.row(position) + 1 for position in positions if order.row(position) != 4]
        assert batch["width"].tolist() == good if good else batch == {}


def test_an_abandoned_loader_ends_its_threads():
    others = set(threading.enumerate())
    batches = iterate_batches(PreprocessedSamples(Rows(), preprocess, SampleOrder(3, 6)), [[0]] * 100, 2)
    next(batches)
    own = set(threading.enumerate()) - others
    assert own, "the loader works in threads of its own"
    batches.close()
    for thread in own:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in own)
