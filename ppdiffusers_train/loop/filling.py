"""Filling the cache of encoded samples before the first step, by all ranks together."""

import secrets
import time
from collections import deque
from pathlib import Path

from ppdiffusers_train.cpu.free_memory import return_free_memory
from ppdiffusers_train.cpu.patches import CompiledEncode
from ppdiffusers_train.data.encoded_cache import (
    EncodedSamples,
    Entries,
    draws_something,
    encoders_folder,
    remove_leftovers,
)
from ppdiffusers_train.data.loader import iterate_batches
from ppdiffusers_train.data.pixels import WHITE
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.state import TrainingState
from ppdiffusers_train.module import encode_batch
from ppdiffusers_train.reporting.status_line import StatusLine
from ppdiffusers_train.runtime.checkpoint import require_writable


def encode_dataset(plan: Plan, state: TrainingState) -> EncodedSamples:
    """Encode the samples that the cache does not have yet, and free the module's encoders, which are no longer needed.

    Samples that cannot be used are added to the state's.
    """
    run, module, dataset = plan.run, plan.module, plan.dataset
    root = Path(run.args.encoded_cache_dir)
    require_writable(root, "--encoded_cache_dir")
    background = getattr(dataset, "background", WHITE)
    folder, is_compiled = encoders_folder(root, module, state.precision, len(dataset), background)
    if not folder.exists() and any(root.iterdir()):
        run.log(f"{root}: holds samples of other models, settings or code, which are kept but not used")
    run.ranks.wait_for_all("the others to hash their encoders")  # before anyone makes the folder
    samples = EncodedSamples(folder, dataset, plan.order, choose_variants(plan))
    missing = samples.missing(run.ranks)
    run.log(f"{folder}: {sum(map(len, missing.values()))} of {samples.count} samples are still to be encoded")
    if missing:
        if run.ranks.is_main:
            remove_leftovers(folder)
        if is_compiled:
            module.encode = CompiledEncode(module)
        began = time.monotonic()
        state.bad_samples.add(fill(samples, missing, plan, state), run.log)
        run.log(f"{root}: the cache is complete; encoding took {time.monotonic() - began:.0f} s")
    for name in module.encoders:
        setattr(module, name, None)
    return_free_memory()
    return samples


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


def fill(samples: EncodedSamples, missing: dict, plan: Plan, state: TrainingState) -> dict:
    """Encode the missing samples. Each rank takes the next row when it is free, so all finish at about the same time.

    Args:
        missing: see `EncodedSamples.missing`.
    Returns:
        {row: why it cannot be used}, on every rank.
    """
    ranks, module = plan.run.ranks, plan.module
    rows, taken, found, done = list(missing), deque(), {}, ranks.counter()
    # Another run may be filling the same cache: each starts at a random row, and skips what is already there.
    start = ranks.broadcast_object(secrets.randbelow(len(rows)))

    def take():
        for piece in ranks.pieces(len(rows)):
            row = rows[(start + piece.start) % len(rows)]
            entries = samples.entries(row)
            for number in missing[row]:
                taken.append(entries[number])
                yield [entries[number]]

    entries = Entries(samples.dataset, module.preprocess)
    batches = iterate_batches(entries, take(), plan.run.args.dataloader_num_workers)
    total = sum(map(len, missing.values()))
    with StatusLine("encoding", "samples", total, visible=ranks.is_main) as status:
        for batch, errors in batches:
            entry = taken.popleft()
            if errors:
                found[entry.row] = errors[0]
            elif batch:  # empty if another run has encoded it by now
                with state.precision.autocast():
                    encoded = encode_batch(module, batch)
                entry.write({name: tensor[0].numpy() for name, tensor in encoded.items()})
            status.advance(done(1) - status.done)  # by all ranks
        parts = ranks.gather_objects(found, "the others to encode their last samples")
        status.advance(total - status.done)
    return {row: message for part in parts for row, message in part.items()}
