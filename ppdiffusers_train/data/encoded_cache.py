"""The cache of encoded samples on disk: frozen models encode each sample once, and training does not need them.

    <encoded_cache_dir>/<encoders>/*.pack

`<encoders>` stands for the encoders (`encoders_key.py`). In the packs (`packs.py`), the key of a sample is a hash of
the image's bytes, the caption and the variant. A sample never has to be invalidated, because its key is a hash of its
inputs.
"""

import hashlib
import json

import numpy as np

from ppdiffusers_train.data.loader import as_error, choose_caption
from ppdiffusers_train.data.packs import HIDDEN, Packs, as_keys
from ppdiffusers_train.data.rows import with_one_caption
from ppdiffusers_train.draws import RowDraws
from ppdiffusers_train.errors import BadSampleError
from ppdiffusers_train.module import as_float32

ROWS_AT_ONCE = 64  # rows that a rank checks for missing entries at a time; it encodes one row at a time


def entry_key(image_digest: bytes, caption: str, variant: int) -> bytes:
    """The key of an encoded sample in the cache."""
    key = hashlib.blake2b(image_digest, digest_size=16)
    key.update(json.dumps([caption, variant]).encode())
    return key.digest()


def draws_something(module, dataset) -> bool:
    """Whether `preprocess` draws random numbers, tried with the first usable sample."""
    for row in range(len(dataset)):
        draws = RowDraws(0, 0)
        try:
            module.preprocess(with_one_caption(dataset[row]), draws)
        except BadSampleError:
            continue
        return bool(draws.drawn)
    return False


class Entry:
    """One encoded sample: a row with one of its captions, in one variant."""

    def __init__(self, image_digest: bytes, row: int, caption: str, variant: int):
        self.row, self.caption, self.variant = row, caption, variant
        self.key = entry_key(image_digest, caption, variant)

    def draws(self) -> RowDraws:
        """The random numbers of this variant, for crop and flip. They depend on the content, not on the run."""
        return RowDraws(self.variant, int(self.key.hex()[:15], 16))

    def preprocessed(self, dataset, preprocess) -> dict:
        """The input of the encoders: `{name: array}`.

        Raises:
            BadSampleError: the sample cannot be used.
        """
        return preprocess({**dataset[self.row], "caption": self.caption}, self.draws())


class RunEntries:
    """The entries of a run: which ones it may need, and which one each position takes.

    Args:
        dataset: with `captions(row)` and `image_digest(row)`.
        order: the run's `SampleOrder`.
        variants: how many crops and flips of a sample are stored; each position draws which one it takes.
    """

    def __init__(self, dataset, order, variants: int):
        self.dataset, self.order, self.variants = dataset, order, variants

    def _digest(self, row: int) -> bytes:
        try:
            return self.dataset.image_digest(row)
        except BadSampleError:
            return b""  # encoding it reports the error

    @property
    def count(self) -> int:
        """Number of entries."""
        return self.dataset.count_captions() * self.variants

    def of_row(self, row: int) -> list:
        """All entries of a row that a run may need."""
        try:
            captions = self.dataset.captions(row)
        except BadSampleError:  # training reports it when it reads the row
            return []
        digest, numbers = self._digest(row), range(self.variants)
        return [Entry(digest, row, caption, number) for caption in captions for number in numbers]

    def at(self, position: int) -> Entry:
        """The entry of the sample at `position` of the run.

        Raises:
            BadSampleError: it has no caption.
        """
        draws, row = RowDraws(self.order.seed, position), self.order.row(position)
        captions = self.dataset.captions(row)
        caption = captions[choose_caption(draws, len(captions))]
        variant = int(draws.integers("cache_variant", 0, self.variants))
        return Entry(self._digest(row), row, caption, variant)


class UnencodedSamples:
    """At an `Entry`: the input of the encoders, `{name: array}`, or nothing for an entry that exists by now."""

    def __init__(self, packs: Packs, dataset, preprocess):
        self.packs, self.dataset, self.preprocess = packs, dataset, preprocess

    def __getitem__(self, entry):
        if self.packs.find(as_keys([entry.key])).all():
            return {}
        try:
            return entry.preprocessed(self.dataset, self.preprocess)
        except BadSampleError as error:
            return as_error(error)


class EncodedSamples:
    """At index `position`: the run's sample at that position, encoded, as `{name: array}`.

    Args:
        packs: of these encoders in the cache.
        entries: those of the run.
    """

    def __init__(self, packs: Packs, entries: RunEntries):
        self.packs, self.entries = packs, entries

    def encode(self, batch: dict) -> dict:
        """`{name: [B, …]} -> {name: [B, …]}`: what the module's `forward` takes. It is encoded already."""
        return as_float32(batch)

    def missing(self, ranks) -> np.ndarray:
        """The entries that are missing, on every rank: (row, number among the row's entries), int64 [n, 2], sorted.

        Ranks divide the search and exchange their findings.
        """
        found = [np.empty([0, 2], np.int64)]
        for piece in ranks.pieces(len(self.entries.dataset), ROWS_AT_ONCE):
            entries = [(row, n, entry.key) for row in piece for n, entry in enumerate(self.entries.of_row(row))]
            is_there = self.packs.find(as_keys(key for *_, key in entries))
            found.append(np.array([entry[:2] for entry in entries], np.int64).reshape(-1, 2)[~is_there])
        parts = ranks.gather_objects(np.concatenate(found), "the others to list missing entries of the cache")
        missing = np.concatenate(parts)
        return missing[np.lexsort(missing.T[::-1])]  # in the order on disk

    def __getitem__(self, position):
        try:
            entry = self.entries.at(position)
            return {name: array for name, array in self.packs.read(entry.key).items() if not name.startswith(HIDDEN)}
        except BadSampleError as error:
            return as_error(error)
        except KeyError:
            return as_error(f"{self.entries.dataset.name(entry.row)}: could not be encoded")
        except OSError as error:
            return as_error(error)
