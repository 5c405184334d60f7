"""From positions in the run to batches of tensors: decoding and preprocessing in threads.

It uses threads, because Pillow and NumPy release the GIL while they work, and because processes that are forked from a
multithreaded one hang now and then, as Paddle's `DataLoader` did.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle

from ppdiffusers_train.batches import ragged_names
from ppdiffusers_train.draws import RowDraws
from ppdiffusers_train.errors import BadSampleError
from ppdiffusers_train.module import encode_batch

ERROR_KEY = "error"
BATCHES_AHEAD = 4


class PreprocessedSamples:
    """At index `position`: the run's sample at that position, preprocessed to `{name: array}`.

    An unusable sample becomes `{"error": message}`; the loop decides whether to skip it.

    Args:
        rows: maps a row's index to `{"image": …, "caption": …}`.
        preprocess: `(row, draws) -> {name: array}`, a training module's.
        order: the run's `SampleOrder`.
    """

    def __init__(self, rows, preprocess, order):
        self.rows, self.preprocess, self.order = rows, preprocess, order

    def __getitem__(self, position):
        draws = RowDraws(self.order.seed, position)
        try:
            row = self.rows[self.order.row(position)]
            if isinstance(row["caption"], list):
                row["caption"] = row["caption"][choose_caption(draws, len(row["caption"]))]
            return self.preprocess(row, draws)
        except BadSampleError as error:
            return as_error(error)


class OnlineSamples(PreprocessedSamples):
    """Preprocessed samples whose batches are encoded during training.

    Args:
        module: the training module, whose `preprocess` and `encode` are used.
    """

    def __init__(self, rows, module, order):
        super().__init__(rows, module.preprocess, order)
        self.module = module

    def encode(self, batch: dict) -> dict:
        """`{name: [B, …]} -> {name: [B, …]}`: what the module's `forward` takes."""
        return encode_batch(self.module, batch)


def as_error(error) -> dict:
    """The placeholder of an unusable sample."""
    return {ERROR_KEY: str(error)}


def choose_caption(draws: RowDraws, count: int) -> int:
    """The index of the caption, of a sample's `count`, that this position of the run takes."""
    return int(draws.integers("caption_choice", 0, count)) if count > 1 else 0


def stack(samples: list) -> tuple:
    """`[{name: array}]` -> `{name: tensor [B, …]}` of the usable samples, and `{index in the list: message}` of the
    others."""
    errors = {i: sample[ERROR_KEY] for i, sample in enumerate(samples) if ERROR_KEY in sample}
    good = [sample for i, sample in enumerate(samples) if i not in errors]
    first = good[0] if good else {}
    padded = ragged_names(first)
    batch = {name: (stack_padded if name in padded else np.stack)([sample[name] for sample in good]) for name in first}
    return {name: to_device(array) for name, array in batch.items()}, errors


def stack_padded(arrays: list) -> np.ndarray:
    """Arrays [L, …] of different lengths as one [B, L, …], padded with zeros to the longest."""
    stacked = np.zeros([len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]], arrays[0].dtype)
    for row, array in zip(stacked, arrays):
        row[: len(array)] = array
    return stacked


def to_device(array):
    """An array as a tensor on the device. It is copied to a GPU asynchronously, through pinned memory. Not tested on a
    GPU."""
    if paddle.get_device().startswith("gpu"):
        return paddle.to_tensor(array, place=paddle.CUDAPinnedPlace()).cuda(blocking=False)
    return paddle.to_tensor(array)


def iterate_batches(samples, batches, num_workers: int):
    """Yield the result of `stack` for each list of indices in `batches`, in order.

    Args:
        samples: `samples[index]` -> {name: array}; called from several threads.
        num_workers: threads that load in advance; with 0, each batch is loaded when it is needed.
    """
    if num_workers == 0:
        for indices in batches:
            yield stack([samples[index] for index in indices])
        return
    pending = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loader")
    try:
        for indices in batches:
            pending.append([pool.submit(samples.__getitem__, index) for index in indices])
            if len(pending) >= BATCHES_AHEAD:
                yield stack([future.result() for future in pending.popleft()])
        while pending:
            yield stack([future.result() for future in pending.popleft()])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
