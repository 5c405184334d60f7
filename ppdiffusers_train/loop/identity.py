"""What a run is: its seed, its arguments, the versions it depends on. Written into its folder and its checkpoints."""

from ppdiffusers_train import __version__

import inspect
import platform
import secrets
import shlex
import sys
from pathlib import Path

import paddle

from ppdiffusers_train.errors import UserError, hide_tokens
from ppdiffusers_train.runtime.agreement import agree, digest, ranks_elsewhere
from ppdiffusers_train.runtime.checkpoint import STATE_FILE, find_checkpoint, read_state, require_writable
from ppdiffusers_train.runtime.distributed import Ranks
from ppdiffusers_train.runtime.precision import Precision, set_deterministic, set_tf32
from ppdiffusers_train.runtime.tracing import can_compile_models

LIBRARY = Path(__file__).parents[1].name
SECRETS = ("hub_token",)
# Flags that a rank may have for itself. What is found in these places is compared, so each node may have a copy:
OWN_PLACES = {
    "train_data_dir",
    "dataset_name",
    "train_shards_path_or_url",
    "encoded_cache_dir",
    "pretrained_model_name_or_path",
    "pretrained_decoder_model_name_or_path",
    "pretrained_prior_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "pretrained_teacher_model",
}
# `config` holds other flags, `output_dir` has rules of its own (`settle_folders`), `local_rank` has no effect. No
# number depends on how and from where a rank loads. The rest rank 0 alone reads.
OWN_FLAGS = {
    *("config", "output_dir", "local_rank", "cache_dir", "dataloader_num_workers"),
    *("hub_token", "report_to", "logging_dir", "peak_tflops"),
}


def settle_cache_folder(args) -> None:
    """Without `--encoded_cache_dir`, set it to the folder in the run's own where `--encoded_cache` asks for one."""
    if args.encoded_cache is False:
        args.encoded_cache_dir = None
    elif args.encoded_cache and not args.encoded_cache_dir:
        args.encoded_cache_dir = str(Path(args.output_dir) / "encoded")


def settle_seed(args, saved, ranks: Ranks) -> None:
    """Without `--seed`, set it to that of the checkpoint to resume from, or to one drawn for all ranks."""
    if args.seed is None:
        args.seed = saved["seed"] if saved else ranks.share(secrets.randbelow(2**31))


def compared_flags(args) -> dict:
    """The flags that all ranks have to have alike; of places that are a rank's own, whether there is one."""
    flags = {name: value for name, value in public_arguments(args).items() if name not in OWN_FLAGS}
    flags = {name: value is not None if name in OWN_PLACES else value for name, value in flags.items()}
    return {f"--{name}": value for name, value in flags.items()}


def compared_code() -> dict:
    """The versions that all ranks have to have alike, and a hash of this project's code, which may be edited."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    libraries = {f"version of {name}": version for name, version in versions().items() if name != "python"}
    return {**libraries, f"code of {LIBRARY}": digest(code)}


def job_code(module) -> dict:
    """{file of a script: a hash} of those that say what a training module does."""
    written = [part for part in type(module).__mro__ if part.__module__.partition(".")[0] not in (LIBRARY, "paddle")]
    functions = [value for part in written for value in vars(part).values() if inspect.isfunction(value)]
    files = {Path(inspect.getfile(function)) for function in functions}
    return {f"code of {file.name}": digest(file.read_bytes()) for file in sorted(files)}


def choose_checkpoint(args, ranks: Ranks, say) -> tuple:
    """What rank 0 finds for `--resume_from_checkpoint`, for all ranks: (folder, state), or (None, {}).

    Raises:
        UserError: on every rank the same: it is none, or another rank does not see it.
    """
    if not args.resume_from_checkpoint:
        return None, {}
    output_dir, place, mistake = Path(args.output_dir), None, ""
    if ranks.is_main:
        try:
            folder, _ = find_checkpoint(args.resume_from_checkpoint, output_dir, say)
            place = folder and (folder.parent == output_dir, folder.name, str(folder))
        except UserError as error:
            mistake = str(error)
    place, mistake = ranks.share((place, mistake))
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


def settle_folders(args, ranks: Ranks, is_resumed: bool) -> None:
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
        elsewhere, folders = ranks_elsewhere(Path(folder), ranks), ranks.gather(str(folder))
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
