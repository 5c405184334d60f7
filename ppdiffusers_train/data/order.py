"""The order of samples: a pure function of the seed, whatever the number of GPUs, workers or accumulation steps."""

import math
from itertools import groupby

import numpy as np

from ppdiffusers_train.data.buckets import assign_buckets, describe_buckets
from ppdiffusers_train.draws import generator


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `size` rows: int64 [size]."""
    return generator(seed, epoch, "order").permutation(size)


def grouped(rows: np.ndarray, buckets: np.ndarray, block: int) -> np.ndarray:
    """The same rows in blocks of `block` rows of one bucket, each at the place of its last row; incomplete blocks last.

    Args:
        buckets: the bucket of every row of the dataset.
    """
    rows, buckets = np.asarray(rows), np.asarray(buckets)
    bucket = buckets[rows]
    by_bucket = np.argsort(bucket, kind="stable")  # places in `rows`, bucket by bucket
    sizes = np.bincount(bucket)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    number = np.arange(len(rows)) - starts  # of a row within its bucket
    first = starts + number // block * block  # of its block, among `by_bucket`
    last = first + block - 1
    is_complete = last < starts + np.repeat(sizes, sizes)
    # Complete blocks in the order of their last rows, then incomplete ones in the order of buckets.
    keys = np.where(is_complete, by_bucket[np.minimum(last, len(rows) - 1)], len(rows) + bucket[by_bucket])
    return rows[by_bucket[np.argsort(keys, kind="stable")]]


CLASS = 1 << 62  # added to a sample's position in the run: that of the class image that is trained beside it


class SampleOrder:
    """The run as one long sequence of positions 0, 1, 2, …; each epoch is the next `size` of them.

    Args:
        seed: the run's seed.
        size: number of rows in the dataset. The attribute is the number of samples of an epoch.
        buckets: the bucket of every row, where samples have different sizes.
        samples_per_step: number of consecutive samples that share a bucket.
        sequential: whether the data has a fixed order, in which the row is the position.
        times: how often an epoch has each row, int64 [size]; None if it has each once.
        class_rows: number of class images, whose rows follow those `size`.
    """

    def __init__(
        self, seed: int, size: int, buckets=None, samples_per_step: int = 1, sequential: bool = False, times=None,
        class_rows: int = 0,
    ):  # fmt: skip
        self.class_rows, self.first_class_row = class_rows, size
        self.repeated = None if times is None else np.repeat(np.arange(size), times)
        self.size = size if times is None else len(self.repeated)
        self.seed, self.samples_per_step = seed, samples_per_step
        self.buckets = None if buckets is None else np.asarray(buckets)
        self.sequential = sequential
        self._permutation = self._class_permutation = (None, None)  # (epoch, rows) of the last call

    def row(self, position: int) -> int:
        """Index of the dataset's row that stands at `position` of the run."""
        if self.sequential:
            return position
        if position >= CLASS:
            return self.first_class_row + self._class_image(position - CLASS)
        epoch, offset = divmod(position, self.size)
        known_epoch, rows = self._permutation
        if known_epoch != epoch:
            rows = permutation(self.seed, epoch, self.size)
            if self.repeated is not None:
                rows = self.repeated[rows]
            if self.buckets is not None:
                rows = grouped(rows, self.buckets, self.samples_per_step)
            self._permutation = (epoch, rows)  # in one assignment, because several loader threads call this
        return int(rows[offset])

    def _class_image(self, number: int) -> int:
        """The class image beside the sample at position `number`: all in turn, in another order each time."""
        turn, offset = divmod(number, self.class_rows)
        known_turn, images = self._class_permutation
        if known_turn != turn:
            images = generator(self.seed, turn, "order of class images").permutation(self.class_rows)
            self._class_permutation = (turn, images)
        return int(images[offset])

    def class_window(self, window: range) -> range:
        """The positions of the class images that are trained beside the samples of a step."""
        return range(window.start + CLASS, window.stop + CLASS) if self.class_rows else range(0)

    def bucket(self, position: int) -> int:
        """The bucket of the sample at `position`."""
        return 0 if self.buckets is None else int(self.buckets[self.row(position)])

    def steps_per_epoch(self, samples_per_step: int) -> int:
        """Optimizer steps of one epoch; the last one may have fewer samples."""
        return math.ceil(self.size / samples_per_step)

    def steps_until(self, epochs: int, position: int, samples_per_step: int) -> int:
        """Optimizer steps from `position` to the end of epoch `epochs`; 0 if that is past."""
        finished, offset = divmod(position, self.size)
        whole = epochs - finished - bool(offset)
        if whole < 0:
            return 0
        rest = math.ceil((self.size - offset) / samples_per_step) if offset else 0
        return rest + whole * self.steps_per_epoch(samples_per_step)

    def windows(self, position: int, samples_per_step: int):
        """Yield the range of positions of each optimizer step from `position` on, without end.

        A window never crosses the end of an epoch, so the last one of an epoch may be short.
        """
        while True:
            end_of_epoch = (position // self.size + 1) * self.size
            window = range(position, min(position + samples_per_step, end_of_epoch))
            yield window
            position = window.stop


def micro_batches(window: range, rank: int, world_size: int, batch_size: int, bucket=lambda position: 0) -> list:
    """This rank's share of a step's window, split into batches of one bucket each. Each position belongs to one rank;
    the shares are as even as possible."""
    batches = []
    for _, share in groupby(window[rank::world_size], bucket):
        share = list(share)
        batches += [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    return batches


def order_samples(module, dataset, seed: int, samples_per_step: int, log) -> SampleOrder:
    """The order of a run's samples. Where the module has buckets, logs how many images each has.

    Args:
        log: called with the line to print.
    """
    times, is_sequential = getattr(dataset, "times", None), getattr(dataset, "sequential", False)
    buckets = None
    if module.buckets:
        buckets = assign_buckets(module.buckets, dataset)
        log(describe_buckets(module.buckets, buckets))
    class_rows = getattr(dataset, "class_rows", 0)
    size = len(dataset) - class_rows
    return SampleOrder(seed, size, buckets, samples_per_step, is_sequential, times, class_rows)
