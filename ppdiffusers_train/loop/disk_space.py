"""How much disk a run will need, told before its first step. A run whose disk is too small is refused.

The weights of a checkpoint are rehearsed: they are written by the job's own code, but without contents of tensors. So
what a job writes besides its parameters counts.
"""

import os
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ppdiffusers_train.errors import UserError, WriteError, writing
from ppdiffusers_train.loop.dry_run import human
from ppdiffusers_train.loop.filling import Cache, missing_bytes
from ppdiffusers_train.loop.memory_estimate import optimizer_state_bytes
from ppdiffusers_train.loop.optimizers import optimizer_name, options_of
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.state import TrainingState
from ppdiffusers_train.reporting.status_line import counted
from ppdiffusers_train.runtime.agreement import found_by_main
from ppdiffusers_train.runtime.checkpoint import complete_checkpoints, step_of
from ppdiffusers_train.runtime.run_folder import earlier_checkpoints
from ppdiffusers_train.tensor_files import rehearsal, rehearsed_size, size_in_bytes


@dataclass(frozen=True)
class Need:
    """What a run will write to a folder."""

    folder: Path
    flag: str  # that names the folder
    size: int  # in bytes
    what: str  # in words


def run_needs(plan: Plan, state: TrainingState) -> tuple:
    """The `Need`s of a run for checkpoints and the result, and why they are not known, or "".

    It is called while the weights are in memory.
    """

    def find():
        try:
            return list(needs_of(plan, state)), ""
        except (OSError, WriteError) as error:  # the run will tell when it writes what matters
            return [], str(error)

    with state.float32_weights(only_main=True):  # as in files
        return found_by_main(plan.run.ranks, find)


def check_disk(plan: Plan, state: TrainingState, needs: tuple, cache: Cache | None) -> None:
    """Print what disk the run will need for samples to encode, checkpoints and the result.

    Args:
        needs: its `run_needs`.
        cache: that of the run, if it has one.
    Raises:
        UserError: the same on every rank: it is not there.
    """
    line = found_by_main(plan.run.ranks, lambda: describe_disks(plan, state, *needs, cache))
    plan.run.log(f"disk: {line}")


def describe_disks(plan: Plan, state: TrainingState, needs: list, unknown: str, cache: Cache | None) -> str:
    """What `check_disk` prints. `unknown` is why the `needs` are not known, or ""."""
    try:
        if unknown:
            raise WriteError(unknown)
        if cache:
            size, text = missing_bytes(cache, plan.module, state), f"{counted(cache.count_missing, 'sample')} to encode"
            needs = [Need(cache.root, "--encoded_cache_dir", size, text), *needs]
        free, freed = {}, freed_bytes(plan)
        for need in needs:
            free[need.folder] = shutil.disk_usage(need.folder).free + freed * (need.flag == "--output_dir")
        return describe_needs(needs, {folder: (os.stat(folder).st_dev, size) for folder, size in free.items()})
    except (OSError, WriteError) as error:
        return f"what the run will need is not known: {error}"


def needs_of(plan: Plan, state: TrainingState):
    """Yield the `Need`s of a run for checkpoints and the result."""
    folder, module = plan.run.output_dir, plan.module
    count, trained = checkpoints_to_come(plan, state), rehearsed_bytes(folder, module)
    size = trained + optimizer_bytes(state)
    if state.ema:
        size += trained + sum(map(size_in_bytes, state.ema.averages.values()))
    yield Need(folder, "--output_dir", count * size, f"{counted(count, 'checkpoint')} of {human(size)}")
    is_narrow = plan.run.args.save_dtype in ("float16", "bfloat16")
    size = trained // (2 if is_narrow else 1) + module.copied_bytes(folder)
    yield Need(folder, "--output_dir", size, "the result")


def describe_needs(needs: list, disks: dict) -> str:
    """A line about all of them.

    Args:
        disks: {folder: (number of the disk that it is on, bytes that are free there)}.
    Raises:
        UserError: one of the disks is too small.
    """
    by_disk, parts = defaultdict(list), []
    for need in needs:
        by_disk[disks[need.folder][0]].append(need)
    for on_disk in by_disk.values():
        last, size = on_disk[-1], sum(need.size for need in on_disk)
        free = disks[last.folder][1]
        listed = ", ".join(f"{human(need.size)} for {need.what}" for need in on_disk)
        parts.append(f"{listed} (in {last.folder}; {human(free)} are free)")
        if size > free:
            way_out = " or a smaller --checkpoints_total_limit" if last.flag == "--output_dir" else ""
            raise UserError(
                f"{last.flag}: {str(last.folder)!r}: the run needs {human(size)} on this disk ({listed}), and "
                f"{human(free)} are free; expected more space{way_out}"
            )
    return "; ".join(parts)


def checkpoints_to_come(plan: Plan, state: TrainingState) -> int:
    """How many more checkpoints than now there will be at most: with a limit, the oldest is deleted after a new one has
    been written."""
    args, last = plan.run.args, plan.total_steps
    written = last // args.checkpointing_steps - state.step // args.checkpointing_steps
    written += args.final_checkpoint and state.step < last and last % args.checkpointing_steps > 0
    if args.checkpoints_total_limit is None:
        return written
    own = complete_checkpoints(plan.run.output_dir, plan.run.id)
    kept = sum(step_of(checkpoint) <= state.step for checkpoint in own)  # later ones are set aside
    return min(written, max(args.checkpoints_total_limit + 1 - kept, 1))


def optimizer_bytes(state: TrainingState) -> int:
    """The size of the optimizer's state in a checkpoint, of all ranks together."""
    args, options = state.args, options_of(state.args).items()
    name, is_bf16 = optimizer_name(vars(args)), args.param_dtype == "bf16"
    return sum(optimizer_state_bytes(name, options, p.shape, is_bf16) for p in state.parameters.values())


def freed_bytes(plan: Plan) -> int:
    """What the checkpoints of earlier runs take, which this run deletes before its first step."""
    run = plan.run
    found = earlier_checkpoints(run.output_dir, run.id) if run.args.overwrite_output_dir else []
    return sum(path.stat().st_size for checkpoint in found for path in checkpoint.rglob("*") if path.is_file())


def rehearsed_bytes(folder: Path, module) -> int:
    """What a module's weights take in a checkpoint. Raises a `WriteError` if nothing can be written to `folder`."""
    with (
        writing("--output_dir: a file without contents", folder),
        tempfile.TemporaryDirectory(prefix=".size-", dir=folder) as inside,
    ):
        with rehearsal():
            module.save_weights(inside)
        return sum(rehearsed_size(path) for path in Path(inside).rglob("*") if path.is_file())
