"""From positions in the run to batches of arrays: decoding and preprocessing in worker processes."""

import numpy as np
from paddle.io import DataLoader, Dataset

from ppdiffusers_train.draws import RowDraws
from ppdiffusers_train.errors import BadSampleError

ERROR_KEY = "error"


class PreprocessedSamples(Dataset):
    """At index `position`: the run's sample at that position, preprocessed to `{name: array}`.

    A sample that cannot be used becomes `{"error": its message as bytes}`: an exception would reach the main process
    wrapped in the worker's traceback.

    Args:
        rows: maps a row's index to `{"image": …, "caption": …}`.
        preprocess: `(row, draws) -> {name: array}`, a training module's.
        order: the run's `SampleOrder`.
    """

    def __init__(self, rows, preprocess, order):
        super().__init__()
        self.rows, self.preprocess, self.order = rows, preprocess, order

    def __getitem__(self, position):
        draws = RowDraws(self.order.seed, position)
        try:
            row = self.rows[self.order.row(position)]
        except BadSampleError as error:
            return as_error(error)
        if isinstance(row["caption"], list):
            row["caption"] = row["caption"][choose_caption(draws, len(row["caption"]))]
        return self.preprocess(row, draws)


def as_error(error) -> dict:
    """The sample that stands for one that cannot be used."""
    return {ERROR_KEY: np.frombuffer(str(error).encode(), dtype=np.uint8)}


def choose_caption(draws: RowDraws, count: int) -> int:
    """Which of a sample's `count` captions this position of the run takes."""
    return int(draws.integers("caption_choice", 0, count)) if count > 1 else 0


def stack(samples: list) -> dict:
    """`[{name: array}] -> {name: [B, …]}`; the first sample in error stands for the batch."""
    for sample in samples:
        if ERROR_KEY in sample:
            return sample
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def iterate_batches(samples: Dataset, batches, num_workers: int):
    """Yield for each list of positions in `batches` their samples as `{name: paddle tensor [B, …]}`, in order.

    Raises:
        BadSampleError: a sample cannot be used.
    """
    loader = DataLoader(samples, batch_sampler=batches, collate_fn=stack, num_workers=num_workers)
    for batch in loader:
        if ERROR_KEY in batch:
            raise BadSampleError(bytes(batch[ERROR_KEY].numpy()).decode())
        yield batch
