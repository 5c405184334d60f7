"""A run before its first step: flags are checked, and what they leave open is resolved once for all ranks."""

import argparse
import contextlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.loop import class_images, optimizers, schedule
from ppdiffusers_train.loop.identity import compared_code, compared_flags
from ppdiffusers_train.loop.memory_estimate import compute_on_cpu
from ppdiffusers_train.loop.optimizers import check_optimizer, learning_rate_of
from ppdiffusers_train.loop.prompts import validation_prompts
from ppdiffusers_train.reporting.hub import check_hub_name, open_repository
from ppdiffusers_train.reporting.quiet import quiet_libraries
from ppdiffusers_train.reporting.status_line import print_line
from ppdiffusers_train.reporting.trackers import tracker_names
from ppdiffusers_train.runtime.agreement import agree, digest, found_by_main, ranks_elsewhere
from ppdiffusers_train.runtime.checkpoint import STATE_FILE, find_checkpoint, read_state, require_writable, run_of
from ppdiffusers_train.runtime.distributed import Ranks, start_ranks
from ppdiffusers_train.runtime.folder_lock import FolderLock
from ppdiffusers_train.runtime.precision import Precision, set_deterministic, set_tf32
from ppdiffusers_train.runtime.run_folder import new_run_id, refuse_used_folder, run_of_folder
from ppdiffusers_train.runtime.teardown import release_tensors_at_exit
from ppdiffusers_train.runtime.tracing import can_compile_models


@dataclass(frozen=True)
class Run:
    """The resolved flags of a run and its ranks.

    Args:
        args: the flags, with a seed and, if samples are cached, the folder of the cache.
        ranks: the processes of the run.
        checkpoint: the folder to resume from, or None.
        saved: the contents of that folder's `state.json`, or {}.
        id: of the run; a resumed run keeps it.
        remarks: lines about flags without effect.
        lock: on rank 0, the `FolderLock` of `--output_dir`: a context in which the run takes place.
    """

    args: argparse.Namespace
    ranks: Ranks
    checkpoint: object
    saved: dict
    id: str
    remarks: list
    lock: object = field(default_factory=contextlib.nullcontext)

    @property
    def output_dir(self) -> Path:
        """The folder that everything is written to."""
        return Path(self.args.output_dir)

    @property
    def samples_per_step(self) -> int:
        """The global batch of a step, in samples."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.ranks.world_size

    def log(self, line: str) -> None:
        """Print a line on rank 0 alone."""
        if self.ranks.is_main:
            print_line(line)


def resolve_run(args) -> Run:
    """Check the flags, join the other ranks, and resolve the checkpoint to resume from, the seed and the cache.

    Raises:
        UserError: for every mistake that can be found before data and models are loaded.
    """
    quiet_libraries()
    release_tensors_at_exit()
    if args.dry_run:
        compute_on_cpu()
    # Before anything else, because flags decide which groups and collectives there are. And before models are loaded: a
    # rank that has loaded them then waits for the others as long as these give signs of life.
    ranks = start_ranks(timeout=args.collective_timeout)
    if ranks.world_size > 1:
        agree(ranks, {**compared_flags(args), **compared_code()})
    remarks = set_arithmetic(args)  # models compute while they are loaded, too
    check_flags(args, ranks)
    with contextlib.ExitStack() as until_error:
        lock = contextlib.nullcontext() if args.dry_run else lock_folder(args, ranks)
        until_error.enter_context(lock)
        checkpoint, saved = choose_checkpoint(args, ranks)
        args = resolve_flags(args, saved, ranks)
        if not args.dry_run:
            check_shared_folders(args, ranks, is_resumed=checkpoint is not None)
        ranks.share_optimizer_state(args.sharding_degree)
        run_id = run_of(saved) if checkpoint else ranks.broadcast_object(new_run_id())
        until_error.pop_all()
    return Run(args, ranks, checkpoint, saved, run_id, remarks, lock)


def lock_folder(args, ranks: Ranks):
    """Lock `--output_dir` on rank 0; returns the lock, or a context that does nothing on other ranks.

    Raises:
        UserError: the same on every rank: another run is at work there.
    """
    locks = []
    found_by_main(ranks, lambda: locks.append(FolderLock(Path(args.output_dir), bool(args.resume_from_checkpoint))))
    return locks[0] if locks else contextlib.nullcontext()


def resolve_flags(args, saved: dict, ranks: Ranks) -> argparse.Namespace:
    """A copy of the flags with a seed, a learning rate and, if samples are cached, the folder of the cache.

    Without `--seed`, the seed is the checkpoint's, or a random one for all ranks. Without `--encoded_cache_dir`, the
    folder is in `--output_dir`.
    """
    seed, cache = args.seed, args.encoded_cache_dir
    if seed is None:
        seed = saved["seed"] if saved else ranks.broadcast_object(secrets.randbelow(2**31))
    if args.encoded_cache is False:
        cache = None
    elif args.encoded_cache and not cache:
        cache = str(Path(args.output_dir) / "encoded")
    rate = learning_rate_of(args)
    return argparse.Namespace(**{**vars(args), "seed": seed, "encoded_cache_dir": cache, "learning_rate": rate})


def check_flags(args, ranks: Ranks) -> None:
    """Raise a `UserError` for flags that contradict each other, or that need something that is missing."""
    check_optimizer(args)
    found_by_main(ranks, lambda: validation_prompts(args))
    class_images.wants_class_images(args)
    output_dir = Path(args.output_dir)
    for name in ("train_data_dir", "validation_data_dir", "class_data_dir"):
        images = getattr(args, name, None)
        if images and output_dir.resolve().is_relative_to(Path(images).resolve()):
            raise UserError(
                f"--output_dir: {str(output_dir)!r} lies in --{name}, so the run's own images would become part of the "
                "data; expected another folder"
            )
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        raise UserError("--overwrite_output_dir: there is --resume_from_checkpoint as well; expected one of them")
    require_writable(output_dir, "--output_dir")
    tracker_names(args.report_to)
    if args.push_to_hub or args.hub_model_id:
        check_hub_name(output_dir, args.hub_model_id)
    if args.push_to_hub and not args.dry_run:
        found_by_main(ranks, lambda: open_repository(output_dir, args.hub_model_id, args.hub_token))
    if args.save_dtype == "bfloat16" and args.save_format == "ppdiffusers":
        raise UserError(
            "--save_dtype bfloat16: ppdiffusers cannot read such files; expected float32 or float16, or --save_format "
            "diffusers"
        )


def refuse_shorter_run(run: Run, total_steps: int, epoch_size: int) -> None:
    """Raise a `UserError` if the checkpoint is of a later step, or of a later epoch, than the last one of the run."""
    step, epochs = run.saved.get("step", 0), run.saved.get("position", 0) / epoch_size
    found, more = f"step {step}, but the run has {total_steps} steps", "steps"
    if not run.args.max_train_steps and epochs > run.args.num_train_epochs:
        found, more = f"epoch {epochs:.3g}, but the run has {run.args.num_train_epochs} epochs", "epochs"
    elif step <= total_steps:
        return
    raise UserError(
        f"--resume_from_checkpoint: {run.checkpoint} is of {found}; expected more {more}, or an earlier checkpoint"
    )


def choose_checkpoint(args, ranks: Ranks) -> tuple:
    """The checkpoint of `--resume_from_checkpoint` as rank 0 finds it: (folder, state), or (None, {}).

    Raises:
        UserError: the same on every rank: it is not a checkpoint, another rank does not see it, or there is none and
            the folder holds what another run has written.
    """
    output_dir = Path(args.output_dir)

    def find():
        folder = find_own_checkpoint(args, output_dir)
        return folder and (folder.parent == output_dir, folder.name, str(folder))

    if (place := found_by_main(ranks, find)) is None:
        return None, {}
    is_inside, name, path = place
    folder, saved = output_dir / name if is_inside else Path(path), {}
    try:
        saved = read_state(folder)
        found = f"{name}, after step {saved['step']}, {digest((folder / STATE_FILE).read_bytes())}"
    except UserError as error:
        found = f"{name}, which {str(error).removeprefix(f'{folder} ')}"
    agree(ranks, {f"--resume_from_checkpoint {args.resume_from_checkpoint}": found})
    return folder, saved


def find_own_checkpoint(args, output_dir: Path):
    """The checkpoint that `--resume_from_checkpoint` names, or None for a start at step 0.

    Raises:
        UserError: it is not a checkpoint, or the folder belongs to another run.
    """
    folder, run_id = None, run_of_folder(output_dir)
    if args.resume_from_checkpoint:
        folder, saved = find_checkpoint(args.resume_from_checkpoint, output_dir, run_id)
    if folder is None or (folder.parent != output_dir and run_of(saved) != run_id):
        refuse_used_folder(output_dir, args.overwrite_output_dir)
    return folder


def check_shared_folders(args, ranks: Ranks, is_resumed: bool) -> None:
    """Check that the ranks share the folders that they need to share.

    All ranks need `--output_dir` to resume and to write a sharded optimizer's state, and the cache to read samples that
    another rank has encoded. In a new run without sharding, rank 0 alone writes to `--output_dir`.

    Raises:
        UserError: the same on every rank; it names a rank that sees another folder.
    """
    flags = {"--output_dir": args.output_dir, "--encoded_cache_dir": args.encoded_cache_dir}
    for flag, folder in flags.items():
        if ranks.world_size == 1 or folder is None:
            continue
        require_writable(Path(folder), flag)
        elsewhere, folders = ranks_elsewhere(Path(folder), ranks), ranks.gather_objects(str(folder))
        if not elsewhere:
            continue
        rank = elsewhere[0]
        difference = f"{flag}: rank {rank} has {folders[rank]!r}, which is another folder than rank 0's {folders[0]!r}"
        if flag == "--output_dir" and not is_resumed and args.sharding_degree == 1:
            if ranks.is_main:
                print(f"{difference}; rank 0 alone writes")
            continue
        why = "a resumed run" if is_resumed else "--sharding_degree" if flag == "--output_dir" else "the encoded cache"
        raise UserError(f"{difference}; expected one that all ranks share, which {why} needs")


def set_arithmetic(args) -> list:
    """Switch TF32 and deterministic kernels as the flags say; returns a line for each flag without effect."""
    lines = []
    if not set_tf32(args.allow_tf32) and args.allow_tf32:
        lines.append("--allow_tf32: no effect, this device has no TF32")
    if args.deterministic and not set_deterministic():
        lines.append("--deterministic: no effect, this device computes the same way every time")
    return lines


def notices(args, precision: Precision, total_steps: int):
    """One line for each flag that has no effect, or an unexpected one, in this run."""
    if precision.notice:
        yield precision.notice
    if args.to_static and not can_compile_models():
        yield "--to_static: no effect, it needs Paddle 3"
    if args.local_rank is not None:
        yield f"--local_rank {args.local_rank}: no effect, paddle.distributed.launch sets the rank"
    yield from class_images.notices(args)
    yield from optimizers.notices(args)
    yield from schedule.notices(args, total_steps)
