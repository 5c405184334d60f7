import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppdiffusers_train.data.buckets import bucket_sizes, describe_buckets, nearest_bucket
from ppdiffusers_train.data.order import SampleOrder, grouped, micro_batches

pytestmark = pytest.mark.once  # no Paddle in it

resolutions = st.integers(1, 24).map(lambda count: 64 * count)


def test_sizes_for_1024_pixels_are_those_of_sdxl_s_paper_where_they_leave_no_pixel_unused():
    """Appendix I of arXiv 2307.01952, from 0.25 to 4; the paper keeps two heights for some widths."""
    sizes = bucket_sizes(1024)
    for size in ((1024, 1024), (2048, 512), (512, 2048), (1216, 832), (832, 1216), (1152, 896), (1344, 768)):
        assert size in sizes


@given(resolution=resolutions)
def test_sizes_are_multiples_of_64_within_the_pixels_and_the_square_is_among_them(resolution):
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and height * (width + 64) > resolution**2 >= height * width
        assert max(height, width) <= 4 * min(height, width)


@given(resolution=resolutions, width=st.integers(16, 4000), height=st.integers(16, 4000))
def test_the_nearest_size_is_the_one_of_the_nearest_ratio(resolution, width, height):
    sizes = bucket_sizes(resolution)
    chosen = sizes[nearest_bucket(sizes, width, height)]
    distances = [abs(np.log(h / w) - np.log(height / width)) for h, w in sizes]
    assert abs(np.log(chosen[0] / chosen[1]) - np.log(height / width)) == min(distances)


@given(buckets=st.lists(st.integers(0, 3), min_size=1, max_size=40), block=st.integers(1, 6), seed=st.integers(0, 99))
def test_blocks_hold_one_bucket_and_every_row_comes_once_per_epoch(buckets, block, seed):
    order = SampleOrder(seed, len(buckets), buckets, block)
    rows = [order.row(position) for position in range(len(buckets))]
    assert sorted(rows) == list(range(len(buckets)))
    full = sum(buckets.count(bucket) // block for bucket in set(buckets))
    for start in range(0, full * block, block):
        assert len({buckets[row] for row in rows[start : start + block]}) == 1
    assert rows == [SampleOrder(seed, len(buckets), buckets, block).row(i) for i in range(len(buckets))]


@given(
    buckets=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 5),
)
def test_batches_hold_one_bucket_whatever_the_window(buckets, world_size, batch_size):
    window, seen = range(100, 100 + len(buckets)), []
    for rank in range(world_size):
        for batch in micro_batches(window, rank, world_size, batch_size, lambda position: buckets[position - 100]):
            assert len({buckets[position - 100] for position in batch}) == 1 and len(batch) <= batch_size
            seen += batch
    assert sorted(seen) == list(window)


def test_a_block_stands_where_its_last_row_stood_and_what_is_left_comes_last():
    assert grouped([4, 0, 2, 1, 3], [0, 1, 0, 1, 1], 2).tolist() == [0, 2, 4, 1, 3]


def test_the_statistics_name_the_sizes_in_use():
    said = describe_buckets([(64, 128), (96, 96), (128, 64)], [0, 2, 0])
    assert said == "2 of 3 sizes are used (height x width: images): 64 x 128: 2, 128 x 64: 1"
