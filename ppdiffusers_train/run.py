"""What a run is: its seed, its arguments, the versions it depends on. Written into its folder and its checkpoints."""

from ppdiffusers_train import __version__

import platform
import secrets
import shlex
import sys
from pathlib import Path

import paddle

from ppdiffusers_train.errors import UserError, hide_tokens
from ppdiffusers_train.runtime.distributed import start_ranks
from ppdiffusers_train.runtime.precision import Precision, set_deterministic, set_tf32
from ppdiffusers_train.runtime.tracing import can_compile_models

SECRETS = ("hub_token",)


def settle_cache_folder(args) -> None:
    """Without `--encoded_cache_dir`, set it to the folder in the run's own where `--encoded_cache` asks for one."""
    if args.encoded_cache is False:
        args.encoded_cache_dir = None
    elif args.encoded_cache and not args.encoded_cache_dir:
        args.encoded_cache_dir = str(Path(args.output_dir) / "encoded")


def settle_seed(args, saved) -> None:
    """Without `--seed`, set it to that of the checkpoint to resume from, or to one drawn for all ranks."""
    if args.seed is None:
        ranks = start_ranks(args.sharding_degree, args.collective_timeout)
        args.seed = saved["seed"] if saved else ranks.share(secrets.randbelow(2**31))


def public_arguments(args) -> dict:
    """The flags without their secrets, as they may be written and sent."""
    public = {name: value for name, value in vars(args).items() if name not in SECRETS}
    return {name: hide_tokens(value) if isinstance(value, str) else value for name, value in public.items()}


def public_command(args) -> str:
    """The command line, without the secrets in it."""
    command = shlex.join(sys.argv)
    for name in SECRETS:
        if getattr(args, name):
            command = command.replace(getattr(args, name), "***")
    return hide_tokens(command)


def run_identity(module, dataset, args, saved, samples_per_step: int) -> dict:
    """What makes this run this run; a checkpoint to resume from must agree, or it would go on with other samples."""
    identity = {"job": type(module).__name__, "seed": args.seed, "rows": len(dataset)}
    if hasattr(dataset, "digest"):
        identity["data"] = dataset.digest()
    if module.buckets:  # then the order depends on it
        identity["samples_per_step"] = samples_per_step
    words = {
        "seed": "--seed",
        "rows": "number of samples",
        "data": "data (a hash of all captions, or of a stream's addresses)",
        "samples_per_step": "number of samples per step",
    }
    for name, value in identity.items():
        if saved and saved.get(name) != value:
            raise UserError(
                f"--resume_from_checkpoint: {args.resume_from_checkpoint!r} is of another run: its "
                f"{words.get(name, name)} is {saved.get(name)}, here it is {value}"
            )
    return identity


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


def versions() -> dict:
    """The versions that a result depends on."""
    import ppdiffusers

    return {
        "python": platform.python_version(),
        "paddle": paddle.__version__,
        "ppdiffusers": ppdiffusers.__version__,
        "ppdiffusers_train": __version__,
    }
