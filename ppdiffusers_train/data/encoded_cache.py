"""The cache of encoded samples on disk: frozen models encode each sample once, and training does not need them.

    <encoded_cache_dir>/<encoders>/<first two digits of the sample>/<sample>.safetensors

`<encoders>` is a hash of the code, the settings and the weights of the encoders, followed by `-compiled` where they are
compiled (`cpu/patches.py`). `<sample>` is a hash of the image's bytes, the caption and the variant. An entry never has
to be invalidated, because its name is a hash of its inputs. Files are written atomically, so filling a cache can be
interrupted at any time, and several processes can fill and read it at the same time. Files are mapped into memory,
where all ranks of a machine share them.
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
from ppdiffusers_train.data.pixels import VERSION, WHITE
from ppdiffusers_train.data.rows import with_one_caption
from ppdiffusers_train.data.source_code import sources
from ppdiffusers_train.draws import RowDraws
from ppdiffusers_train.errors import BadSampleError, writing
from ppdiffusers_train.runtime.checkpoint import sync
from ppdiffusers_train.runtime.processes import is_alive, this_machine
from ppdiffusers_train.tensor_files import write_tensors

ROWS_AT_ONCE = 64  # rows that a rank checks for missing entries at a time; it encodes one row at a time
OLD_SECONDS = 24 * 3600  # age of an unfinished file after which no process is still writing it


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files of processes that were killed while they filled the cache.

    Whether a writer is alive is known on its own machine only. Files of other machines or containers are kept for a
    day.
    """
    for file in folder.glob("??/.*"):
        with contextlib.suppress(OSError):  # its writer has finished it, or another run has removed it
            machine, _, process = file.name.strip(".").removesuffix(".tmp").partition(".")[2].partition(".")
            if this_machine() and machine == f"{this_machine():x}" and process.isdigit():
                is_left = not is_alive(int(process))
            else:
                is_left = time.time() - file.stat().st_mtime > OLD_SECONDS
            if is_left:
                file.unlink()


def encoders_folder(root: Path, module, precision, rows: int, background: str = WHITE) -> tuple:
    """(the cache's folder of these encoders, whether they are compiled for it).

    Compiled encoders round differently, so a cache keeps the kind that it was started with, also when its data grows.
    """
    plain = root / encoders_digest(module, precision, background)
    compiled = plain.with_name(f"{plain.name}-compiled")
    if can_compile(module) and not plain.exists() and (compiled.exists() or rows >= COMPILE_FROM_ROWS):
        return compiled, True
    return plain, False


def encoders_digest(module, precision, background: str = WHITE) -> str:
    """A hash of everything that an encoding depends on besides the sample: code, settings, precision, weights, and how
    pixels come of its image, with `background` behind transparent ones."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources(type(module), "preprocess", "encode"):  # users edit scripts
        digest.update(source.encode())
    settings = {"precision": precision.mixed_precision if precision.enabled else "no", **module.encoding_settings()}
    settings |= {"pixels": VERSION, "background": background}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name in module.encoders:
        for key, tensor in sorted(getattr(module, name).state_dict().items()):
            array = tensor.numpy()
            digest.update(f"{name}.{key} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


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

    def __init__(self, folder: Path, image_digest: bytes, row: int, caption: str, variant: int):
        self.row, self.caption, self.variant = row, caption, variant
        name = hashlib.blake2b(image_digest, digest_size=16)
        name.update(json.dumps([caption, variant]).encode())
        self.file = folder / name.hexdigest()[:2] / f"{name.hexdigest()}.safetensors"

    def draws(self) -> RowDraws:
        """The random numbers of this variant, for crop and flip. They depend on the content, not on the run."""
        return RowDraws(self.variant, int(self.file.stem[:15], 16))

    def preprocessed(self, dataset, preprocess) -> dict:
        """The input of the encoders: `{name: array}`.

        Raises:
            BadSampleError: the sample cannot be used.
        """
        return preprocess({**dataset[self.row], "caption": self.caption}, self.draws())

    def write(self, arrays: dict) -> None:
        """Write the entry to disk atomically."""
        temporary = self.file.with_name(f".{self.file.stem}.{this_machine():x}.{os.getpid()}")
        with writing("--encoded_cache_dir: encoded samples", self.file.parent.parent, "those in it stay usable"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(temporary, arrays, {})
            sync(temporary)
            os.replace(temporary, self.file)


class Entries:
    """Entries to encode, preprocessed. An entry that exists by now gives an empty dictionary."""

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
        folder: the folder of these encoders in the cache.
        dataset: with `captions(row)` and `image_digest(row)`.
        order: the run's `SampleOrder`.
        variants: how many crops and flips of a sample are stored; each position draws which one it takes.
    """

    def __init__(self, folder: Path, dataset, order, variants: int):
        self.folder, self.dataset, self.order, self.variants = folder, dataset, order, variants
        self.digests = {}  # by row, of the images read so far

    def encode(self, batch: dict) -> dict:
        """The batch itself: it is encoded already."""
        return batch

    def _digest(self, row: int) -> bytes:
        if row not in self.digests:
            try:
                self.digests[row] = self.dataset.image_digest(row)
            except BadSampleError:
                self.digests[row] = b""  # encoding it reports the error
        return self.digests[row]

    @property
    def count(self) -> int:
        """Number of entries."""
        return self.dataset.count_captions() * self.variants

    def entries(self, row: int) -> list:
        """All entries of a row that a run may need."""
        try:
            captions = self.dataset.captions(row)
        except BadSampleError:  # training reports it when it reads the row
            return []
        numbers = range(self.variants)
        return [
            Entry(self.folder, self._digest(row), row, caption, number) for caption in captions for number in numbers
        ]

    def missing(self, ranks) -> dict:
        """`{row: numbers of its missing entries}` of all rows that have some, on every rank.

        Ranks divide the search and exchange their findings, so that each image is read by one rank only.
        """
        found = {}
        for piece in ranks.pieces(len(self.dataset), ROWS_AT_ONCE):
            for row in piece:
                numbers = [number for number, entry in enumerate(self.entries(row)) if not entry.file.exists()]
                if numbers:
                    found[row] = self._digest(row), numbers
        missing = {}
        for part in ranks.gather_objects(found, "the others to list missing entries of the cache"):
            for row, (digest, numbers) in part.items():
                self.digests[row], missing[row] = digest, numbers
        return dict(sorted(missing.items()))  # in the order on disk

    def entry(self, position: int) -> Entry:
        """The entry of the sample at `position` of the run.

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
            return as_error(f"{file}: cannot be read ({error}); delete it, and it will be encoded again")
