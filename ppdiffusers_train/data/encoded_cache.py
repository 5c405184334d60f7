"""Encoded samples on disk: the frozen models see each sample once, and training needs them no more.

    <encoded_cache_dir>/<encoders>/<first two digits of the sample>/<sample>.safetensors

`<encoders>` is a hash of the code, the settings and the weights that encode, with `-compiled` behind it where they were
compiled (`cpu/patches.py`); `<sample>` is one of the image's bytes, the caption and the variant. An entry never
has to be invalidated, because what it was made of is its name. A file is
written under another name and renamed, so that a cache interrupted anywhere goes on, and several processes can fill
and read one at the same time. Files are mapped into memory, where all ranks of a machine share them.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ppdiffusers_train.cpu.patches import COMPILE_FROM_ROWS, can_compile
from ppdiffusers_train.data.loader import as_error, choose_caption
from ppdiffusers_train.data.rows import with_one_caption
from ppdiffusers_train.data.source_code import sources
from ppdiffusers_train.draws import RowDraws
from ppdiffusers_train.errors import BadSampleError
from ppdiffusers_train.runtime.checkpoint import sync
from ppdiffusers_train.runtime.processes import is_alive, this_machine
from ppdiffusers_train.tensor_files import write_tensors

ROWS_AT_ONCE = 64  # that a rank looks through for what the cache lacks; of those to encode it takes one
OLD_SECONDS = 24 * 3600  # after which nobody is still writing an entry


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of processes that have been killed while they filled the cache.

    Whether a writer lives can be seen on its own machine only; a file of another one, or in another container, is left
    alone for a day.
    """
    for file in folder.glob("??/.*"):
        with contextlib.suppress(FileNotFoundError):  # its writer has finished it, or another run was faster
            machine, _, process = file.name.strip(".").removesuffix(".tmp").partition(".")[2].partition(".")
            if this_machine() and machine == f"{this_machine():x}" and process.isdigit():
                is_left = not is_alive(int(process))
            else:
                is_left = time.time() - file.stat().st_mtime > OLD_SECONDS
            if is_left:
                file.unlink()


def encoders_folder(root: Path, module, precision, rows: int) -> tuple:
    """(the cache's folder of these encoders, whether they are compiled for it).

    Compiled ones round differently, so a cache that was begun one way goes on that way, also when its data has grown.
    """
    plain = root / encoders_digest(module, precision)
    compiled = plain.with_name(f"{plain.name}-compiled")
    if can_compile(module) and not plain.exists() and (compiled.exists() or rows >= COMPILE_FROM_ROWS):
        return compiled, True
    return plain, False


def encoders_digest(module, precision) -> str:
    """A hash of all that turns a sample into its encoding: code, settings, precision, and the encoders' weights."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources(type(module), "preprocess", "encode"):  # a script is made to be edited
        digest.update(source.encode())
    settings = {"precision": precision.mixed_precision if precision.enabled else "no", **module.encoding_settings()}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name in module.encoders:
        for key, tensor in sorted(getattr(module, name).state_dict().items()):
            array = tensor.numpy()
            digest.update(f"{name}.{key} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def draws_something(module, dataset) -> bool:
    """Whether `preprocess` draws random numbers, asked with the first sample that can be used."""
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

    def __init__(self, folder: Path, image_digest: bytes, row: int, caption: str, variant: int):
        self.row, self.caption, self.variant = row, caption, variant
        name = hashlib.blake2b(image_digest, digest_size=16)
        name.update(json.dumps([caption, variant]).encode())
        self.file = folder / name.hexdigest()[:2] / f"{name.hexdigest()}.safetensors"

    def draws(self) -> RowDraws:
        """The random numbers of this variant's crop and flip: functions of the content, not of the run."""
        return RowDraws(self.variant, int(self.file.stem[:15], 16))

    def preprocessed(self, dataset, preprocess) -> dict:
        """What is encoded: `{name: array}`.

        Raises:
            BadSampleError: the sample cannot be used.
        """
        return preprocess({**dataset[self.row], "caption": self.caption}, self.draws())

    def write(self, arrays: dict) -> None:
        """Put the entry on disk, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.stem}.{this_machine():x}.{os.getpid()}")
        write_tensors(temporary, arrays, {})
        sync(temporary)
        os.replace(temporary, self.file)


class Entries:
    """Entries to encode, preprocessed; one that exists by now is empty."""

    def __init__(self, dataset, preprocess):
        self.dataset, self.preprocess = dataset, preprocess

    def __getitem__(self, entry):
        if entry.file.exists():
            return {}
        try:
            return entry.preprocessed(self.dataset, self.preprocess)
        except BadSampleError as error:
            return as_error(error)


class EncodedSamples:
    """At index `position`: the run's sample at that position, encoded, as `{name: array}`.

    Args:
        folder: of these encoders in the cache.
        dataset: with `captions(row)` and `image_digest(row)`.
        order: the run's `SampleOrder`.
        variants: how many crops and flips of a sample are kept; a position draws which one it takes.
    """

    def __init__(self, folder: Path, dataset, order, variants: int):
        self.folder, self.dataset, self.order, self.variants = folder, dataset, order, variants
        self.digests = {}  # of the images that were asked for

    def encode(self, batch: dict) -> dict:
        """A batch of them is what `forward` takes."""
        return batch

    def _digest(self, row: int) -> bytes:
        if row not in self.digests:
            try:
                self.digests[row] = self.dataset.image_digest(row)
            except BadSampleError:
                self.digests[row] = b""  # encoding it will tell
        return self.digests[row]

    @property
    def count(self) -> int:
        """Number of entries."""
        return self.dataset.count_captions() * self.variants

    def entries(self, row: int) -> list:
        """All entries that a run may ask for of a row."""
        try:
            captions = self.dataset.captions(row)
        except BadSampleError:  # training says so when it meets it
            return []
        numbers = range(self.variants)
        return [
            Entry(self.folder, self._digest(row), row, caption, number) for caption in captions for number in numbers
        ]

    def missing(self, ranks) -> dict:
        """`{row: numbers of those of its entries that are still to be encoded}` where there are any, on every rank.

        Ranks share out the search, and tell the others what they found: these need not read the images, too.
        """
        found = {}
        for piece in ranks.pieces(len(self.dataset), ROWS_AT_ONCE):
            for row in piece:
                numbers = [number for number, entry in enumerate(self.entries(row)) if not entry.file.exists()]
                if numbers:
                    found[row] = self._digest(row), numbers
        missing = {}
        for part in ranks.gather_objects(found, "the others to look what the cache lacks"):
            for row, (digest, numbers) in part.items():
                self.digests[row], missing[row] = digest, numbers
        return dict(sorted(missing.items()))  # as they lie on disk

    def entry(self, position: int) -> Entry:
        """The entry that the sample at `position` of the run takes.

        Raises:
            BadSampleError: it has no caption.
        """
        draws, row = RowDraws(self.order.seed, position), self.order.row(position)
        captions = self.dataset.captions(row)
        caption = captions[choose_caption(draws, len(captions))]
        variant = int(draws.integers("cache_variant", 0, self.variants))
        return Entry(self.folder, self._digest(row), row, caption, variant)

    def __getitem__(self, position):
        try:
            entry = self.entry(position)
        except BadSampleError as error:
            return as_error(error)
        file = entry.file
        try:
            return load_file(file)
        except FileNotFoundError:
            return as_error(f"{self.dataset.name(entry.row)}: could not be encoded")
        except (OSError, SafetensorError) as error:
            return as_error(f"{file}: cannot be read ({error}); delete it, and it is encoded again")
