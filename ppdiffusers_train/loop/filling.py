"""Filling the cache of encoded samples before the first step, by all ranks together."""

import contextlib
import gc
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ppdiffusers_train.cpu.free_memory import return_free_memory
from ppdiffusers_train.cpu.patches import CompiledEncode
from ppdiffusers_train.data.arrow_files import remove_leftovers
from ppdiffusers_train.data.dataset import index_folder
from ppdiffusers_train.data.encoded_cache import (
    EncodedSamples,
    RunEntries,
    UnencodedSamples,
    draws_something,
)
from ppdiffusers_train.data.encoders_key import (
    describe_encoders,
    encoders_digest,
    encoders_folder,
    shared_digests,
    unloaded_encoders,
)
from ppdiffusers_train.data.loader import iterate_batches, stack
from ppdiffusers_train.data.masks import kind_of_masks
from ppdiffusers_train.data.pack_writer import PackWriter, merge_small
from ppdiffusers_train.data.packs import Packs
from ppdiffusers_train.data.pixels import WHITE
from ppdiffusers_train.errors import BadSampleError
from ppdiffusers_train.loop.bad_samples import BadSamples
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.shared_encodings import SharedEncodings
from ppdiffusers_train.loop.state import TrainingState
from ppdiffusers_train.module import encode_alone
from ppdiffusers_train.reporting.status_line import StatusLine
from ppdiffusers_train.runtime.checkpoint import require_writable
from ppdiffusers_train.runtime.swapping import swapped_out

REFRESH_SECONDS = 10  # seconds between two searches for packs of other runs that fill the same cache


@dataclass(frozen=True)
class Cache:
    """The cache of a run, opened.

    Args:
        root: `--encoded_cache_dir`.
        parts: the run's samples in it: those to train on and, if there are any, those that are held out.
        missing: of each part, those that it does not have yet, see `EncodedSamples.missing`.
        sharing: the module's `SharedEncodings`.
        is_compiled: whether its encoders are compiled.
        encoded: {key: arrays} of samples that are encoded, but not written.
    """

    root: Path
    parts: list
    missing: list
    sharing: SharedEncodings
    is_compiled: bool
    encoded: dict = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """That of the run's encoders."""
        return self.parts[0].packs.folder

    @property
    def count_missing(self) -> int:
        """How many samples are still to be encoded."""
        return sum(map(len, self.missing))


def open_cache(plan: Plan, state: TrainingState) -> Cache:
    """Look for the run's samples in the cache."""
    run, module, dataset = plan.run, plan.module, plan.dataset
    root = Path(run.args.encoded_cache_dir)
    require_writable(root, "--encoded_cache_dir")
    background = getattr(dataset, "background", WHITE)
    unloaded = unloaded_encoders(module, index_folder(run.args))
    digest = encoders_digest(module, state.precision, unloaded, background, kind_of_masks(dataset))
    folder, is_compiled = encoders_folder(root, digest, module, len(dataset))
    if not folder.exists() and any(root.iterdir()):
        run.log(f"{root}: holds samples of other models, settings, code or versions, which are kept but not used")
    run.ranks.wait_for_all("the others to hash their encoders")  # before anyone makes the folder
    packs, entries = Packs(folder, run.log), [RunEntries(dataset, plan.order, choose_variants(plan))]
    if plan.held_out:
        entries.append(RunEntries(plan.held_out.dataset, plan.held_out, 1))
    parts = [EncodedSamples(packs, each) for each in entries]
    missing = [samples.missing(run.ranks) for samples in parts]
    count = sum(each.count for each in entries)
    run.log(f"{folder}: {sum(map(len, missing))} of {count} samples are still to be encoded")
    # Compiled encoders round differently, and their methods are no longer called.
    shared = {} if is_compiled or not any(map(len, missing)) else shared_digests(module, state.precision, unloaded)
    return Cache(root, parts, missing, SharedEncodings(module, shared, folder, run.log), is_compiled)


@contextlib.contextmanager
def only_encoders(cache: Cache, module, state: TrainingState, unused):
    """A context in which the encoders are in memory, if samples are missing, and `unused` tensors are not.

    Afterwards the encoders are freed, because they are no longer needed.
    """
    with swapped_out(unused, cache.root) if cache.count_missing else contextlib.nullcontext():
        if cache.count_missing:
            for name in module.not_loaded():
                getattr(module, name)
                state.precision.cast_encoder(module, name)  # before the next one is loaded
            if cache.is_compiled:
                module.encode = CompiledEncode(module)
        yield
        module.free_encoders()
        gc.collect()  # layers refer to each other
        return_free_memory()


def missing_bytes(cache: Cache, module, state: TrainingState) -> int:
    """The size of all samples that are still to be encoded, which is that of the first one that can be, times their
    number. It is encoded for this, and kept in the cache's `encoded`."""
    found = ((part.entries, *place) for part, places in zip(cache.parts, cache.missing) for place in places.tolist())
    for entries, row, number in found:
        entry = entries.of_row(row)[number]
        try:
            batch, _ = stack([entry.preprocessed(entries.dataset, module.preprocess)])
        except BadSampleError:
            continue
        with cache.sharing:
            arrays = cache.encoded[entry.key] = encode_entry(entry.key, batch, module, state, cache.sharing)
        return cache.count_missing * sum(array.nbytes for array in arrays.values())
    return 0


def encode_entry(key: bytes, batch: dict, module, state: TrainingState, sharing) -> dict:
    """What the cache keeps of a sample, `{name: array}`, from its preprocessed batch of one."""
    with state.precision.autocast(), sharing.sample(key) as kept:
        encoded = encode_alone(module, batch)
    return {**{name: tensor[0].numpy() for name, tensor in encoded.items()}, **kept}


def encode_dataset(plan: Plan, state: TrainingState, begin=lambda cache: None, unused=()) -> tuple:
    """Encode the samples that the cache does not have yet, and free the module's encoders, which are no longer needed.

    Samples that cannot be used are added to the state's.

    Args:
        begin: called with the opened cache before anything is written.
        unused: tensors that take no memory while samples are encoded.
    Returns:
        The `EncodedSamples` to train on, and those that are held out, or None.
    Raises:
        BadSampleError: more samples than may be skipped cannot be used, or one that is held out.
    """
    cache = open_cache(plan, state)
    with only_encoders(cache, plan.module, state, unused):
        begin(cache)
        if cache.count_missing:
            fill_all(cache, plan, state)
    return cache.parts[0], cache.parts[1] if plan.held_out else None


def fill_all(cache: Cache, plan: Plan, state: TrainingState) -> None:
    """Encode all samples that are missing."""
    run, folder = plan.run, cache.folder
    if run.ranks.is_main:
        remove_leftovers(folder)
        describe_encoders(folder, plan.module, state.precision, cache.sharing.digests)
    began = time.monotonic()
    with cache.sharing:
        for samples, missing in zip(cache.parts, cache.missing):
            found = fill(cache, samples, missing, plan, state) if len(missing) else {}
            bad = state.bad_samples if samples is cache.parts[0] else BadSamples(0)
            bad.add(found, run.log)
    run.log(f"{cache.root}: the cache is complete; encoding took {time.monotonic() - began:.0f} s")


def choose_variants(plan: Plan) -> int:
    """Number of variants (crop, flip, caption) of a sample that the cache keeps."""
    variants = plan.run.args.cache_variants
    is_random = draws_something(plan.module, plan.dataset)
    if variants > 1 and not is_random:
        plan.run.log(f"--cache_variants {variants}: no effect, this job prepares a sample in one way only")
        return 1
    if variants == 1 and is_random:
        plan.run.log("--cache_variants 1: each sample keeps one crop, flip and caption for the whole run")
    return variants


def fill(cache: Cache, samples: EncodedSamples, missing: np.ndarray, plan: Plan, state: TrainingState) -> dict:
    """Encode the missing samples. Each rank takes the next row when it is free, so all finish at about the same time.

    Args:
        samples, missing: a part of the cache's.
    Returns:
        {row: why it cannot be used}, on every rank.
    """
    ranks, found, total = plan.run.ranks, {}, len(missing)
    with StatusLine("encoding", "samples", total, visible=ranks.is_main) as status:
        with PackWriter(samples.packs.folder) as writer:
            for row, message in encode_missing(cache, samples, missing, plan, state, writer, status):
                found[row] = message
        parts = ranks.gather_objects((found, writer.written), "the others to encode their last samples")
        status.advance(total - status.done)
    with ranks.only_main("small packs of the cache to be put together") as is_turn:
        if is_turn:
            merge_small(writer.folder)
    samples.packs.refresh(name for _, names in parts for name in names)
    return {row: message for part, _ in parts for row, message in part.items()}


def encode_missing(cache: Cache, samples, missing: np.ndarray, plan: Plan, state, writer, status):
    """Encode this rank's share of the missing samples; yields (row, why it cannot be used)."""
    ranks, module, packs = plan.run.ranks, plan.module, samples.packs
    (rows, starts), taken, done = np.unique(missing[:, 0], return_index=True), deque(), ranks.counter()
    numbers = np.split(missing[:, 1], starts[1:])
    # Another run may be filling the same cache: each starts at a random row, and skips what is already there.
    start, looked = ranks.broadcast_object(secrets.randbelow(len(rows))), time.monotonic()

    def take():
        for piece in ranks.pieces(len(rows)):
            place = (start + piece.start) % len(rows)
            entries = samples.entries.of_row(int(rows[place]))
            for number in numbers[place].tolist():
                taken.append(entries[number])
                yield [entries[number]]

    unencoded = UnencodedSamples(packs, samples.entries.dataset, module.preprocess)
    batches = iterate_batches(unencoded, take(), plan.run.args.dataloader_num_workers)
    for batch, errors in batches:
        entry = taken.popleft()
        if errors:
            yield entry.row, errors[0]
        elif batch:  # empty if another run has encoded it by now
            arrays = cache.encoded.pop(entry.key, None) or encode_entry(entry.key, batch, module, state, cache.sharing)
            writer.add(entry.key, arrays)
        if time.monotonic() - looked > REFRESH_SECONDS:
            packs.refresh()
            looked = time.monotonic()
        status.advance(done(1) - status.done)  # by all ranks
