"""A run before its first step: its flags are checked, and what they leave open is resolved, once and for all ranks."""

import argparse
import secrets
from dataclasses import dataclass
from pathlib import Path

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.loop.identity import compared_code, compared_flags
from ppdiffusers_train.loop.memory_estimate import compute_on_cpu
from ppdiffusers_train.loop.state import check_optimizer
from ppdiffusers_train.reporting.hub import check_hub_login
from ppdiffusers_train.reporting.quiet import quiet_libraries
from ppdiffusers_train.reporting.trackers import tracker_names
from ppdiffusers_train.runtime.agreement import agree, digest, ranks_elsewhere
from ppdiffusers_train.runtime.checkpoint import STATE_FILE, find_checkpoint, read_state, require_writable
from ppdiffusers_train.runtime.distributed import Ranks, start_ranks
from ppdiffusers_train.runtime.folder_lock import wait_for_folder
from ppdiffusers_train.runtime.precision import Precision, set_deterministic, set_tf32
from ppdiffusers_train.runtime.teardown import release_tensors_at_exit
from ppdiffusers_train.runtime.tracing import can_compile_models


@dataclass(frozen=True)
class Run:
    """What a run's flags come to.

    Args:
        args: the flags, with a seed and, where samples are cached, a folder for that.
        ranks: the processes of the run.
        checkpoint: the folder that it goes on from, or None.
        saved: what that folder's `state.json` holds, or {}.
    """

    args: argparse.Namespace
    ranks: Ranks
    checkpoint: object
    saved: dict

    @property
    def output_dir(self) -> Path:
        """Where everything is written."""
        return Path(self.args.output_dir)

    @property
    def samples_per_step(self) -> int:
        """The global batch of a step."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.ranks.world_size

    def log(self, line: str) -> None:
        """Print a line once, not on every rank."""
        if self.ranks.is_main:
            print(line)


def resolve_run(args) -> Run:
    """Check flags, meet the other ranks, and resolve the checkpoint to resume from, the seed and the cache's folder.

    Raises:
        UserError: for all that can be seen to be wrong before data and models are loaded.
    """
    quiet_libraries()
    release_tensors_at_exit()
    if args.dry_run:
        compute_on_cpu()
    # First of all, as flags say which groups and collectives there are. And before models are loaded: who has loaded
    # them waits for those that still give signs of life.
    ranks = start_ranks(timeout=args.collective_timeout)
    if ranks.world_size > 1:
        agree(ranks, {**compared_flags(args), **compared_code()})
    check_flags(args, ranks)
    if not args.dry_run:
        wait_for_folder(Path(args.output_dir))
    checkpoint, saved = choose_checkpoint(args, ranks)
    args = resolve_flags(args, saved, ranks)
    if not args.dry_run:
        check_shared_folders(args, ranks, is_resumed=checkpoint is not None)
    ranks.share_optimizer_state(args.sharding_degree)
    return Run(args, ranks, checkpoint, saved)


def resolve_flags(args, saved: dict, ranks: Ranks) -> argparse.Namespace:
    """A copy of the flags with a seed, which without `--seed` is that of the checkpoint or one drawn for all ranks, and
    with a folder for the cache where one is asked for, which without `--encoded_cache_dir` is in the run's own."""
    seed, cache = args.seed, args.encoded_cache_dir
    if seed is None:
        seed = saved["seed"] if saved else ranks.broadcast_object(secrets.randbelow(2**31))
    if args.encoded_cache is False:
        cache = None
    elif args.encoded_cache and not cache:
        cache = str(Path(args.output_dir) / "encoded")
    return argparse.Namespace(**{**vars(args), "seed": seed, "encoded_cache_dir": cache})


def check_flags(args, ranks: Ranks) -> None:
    """Raise a `UserError` for flags that contradict each other, and for what they need and is not there."""
    check_optimizer(args)
    output_dir, images = Path(args.output_dir), getattr(args, "train_data_dir", None)
    if images and output_dir.resolve().is_relative_to(Path(images).resolve()):
        raise UserError(
            f"--output_dir: {str(output_dir)!r} lies in --train_data_dir, whose images the run's own would join; "
            "expected another folder"
        )
    require_writable(output_dir, "--output_dir")
    tracker_names(args.report_to)
    if args.push_to_hub and ranks.is_main:
        check_hub_login(args.hub_token)
    if args.save_dtype == "bfloat16" and args.save_format == "ppdiffusers":
        raise UserError(
            "--save_dtype bfloat16: ppdiffusers cannot read such files; expected float32 or float16, or --save_format "
            "diffusers"
        )


def choose_checkpoint(args, ranks: Ranks) -> tuple:
    """What rank 0 finds for `--resume_from_checkpoint`, for all ranks: (folder, state), or (None, {}).

    Raises:
        UserError: on every rank the same: it is none, or another rank does not see it.
    """
    if not args.resume_from_checkpoint:
        return None, {}
    output_dir, place, mistake = Path(args.output_dir), None, ""
    if ranks.is_main:
        try:
            folder, _ = find_checkpoint(args.resume_from_checkpoint, output_dir, print)
            place = folder and (folder.parent == output_dir, folder.name, str(folder))
        except UserError as error:
            mistake = str(error)
    place, mistake = ranks.broadcast_object((place, mistake))
    if mistake:
        raise UserError(mistake)
    if place is None:
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


def check_shared_folders(args, ranks: Ranks, is_resumed: bool) -> None:
    """See that the ranks share the folders that they have to: to resume they do, and to write a sharded optimizer's
    state, and what one rank encodes all read. In a fresh run rank 0 alone writes the rest.

    Raises:
        UserError: on every rank the same, which names those that see another folder.
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
        told = f"{flag}: rank {rank} has {folders[rank]!r}, which is another folder than rank 0's {folders[0]!r}"
        if flag == "--output_dir" and not is_resumed and args.sharding_degree == 1:
            if ranks.is_main:
                print(f"{told}; rank 0 alone writes")
            continue
        why = "a resumed run" if is_resumed else "--sharding_degree" if flag == "--output_dir" else "the encoded cache"
        raise UserError(f"{told}; expected one that all ranks share, which {why} needs")


def set_arithmetic(args) -> list:
    """Switch TF32 and deterministic kernels as the flags ask for; returns a line for each that has no effect here."""
    lines = []
    if not set_tf32(args.allow_tf32) and args.allow_tf32:
        lines.append("--allow_tf32: no effect, this device has no TF32")
    if args.deterministic and not set_deterministic():
        lines.append("--deterministic: no effect, this device computes the same way every time")
    return lines


def notices(args, precision: Precision, total_steps: int):
    """One line for each flag that does not do here what its name says."""
    if precision.notice:
        yield precision.notice
    if args.to_static and not can_compile_models():
        yield "--to_static: no effect, it needs Paddle 3"
    if args.local_rank != -1:
        yield f"--local_rank {args.local_rank}: no effect, paddle.distributed.launch sets the rank"
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= total_steps:
        yield f"--lr_warmup_steps {args.lr_warmup_steps}: all of the run's {total_steps} steps are warm-up"
