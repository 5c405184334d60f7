"""The identity of a run: seed, flags and versions, which are written into its folder and its checkpoints."""

from ppdiffusers_train import __version__

import inspect
import platform
import shlex
import sys
from pathlib import Path

import paddle

from ppdiffusers_train.errors import UserError, hide_tokens
from ppdiffusers_train.runtime.agreement import digest

LIBRARY = Path(__file__).parents[1].name
SECRETS = ("hub_token",)
# Paths that may differ between ranks: their contents are compared instead, so each node may have its own copy.
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
    "single_file_config",
    "init_lora",
}
# Other flags that may differ. `config` holds flags that are compared, `output_dir` has its own rules
# (`check_shared_folders`), `local_rank` has no effect. `cache_dir` and the number of workers change no result. The rest
# is read by rank 0 alone.
OWN_FLAGS = {
    *("config", "output_dir", "local_rank", "cache_dir", "dataloader_num_workers"),
    *("hub_token", "report_to", "logging_dir", "peak_tflops", "index_dir"),
}


def compared_flags(args) -> dict:
    """The flags that have to be the same on all ranks; of paths that may differ, whether they are given."""
    flags = {name: value for name, value in public_arguments(args).items() if name not in OWN_FLAGS}
    flags = {name: value is not None if name in OWN_PLACES else value for name, value in flags.items()}
    return {f"--{name}": value for name, value in flags.items()}


def compared_code() -> dict:
    """The versions that have to be the same on all ranks, and a hash of this package's code, which may be edited."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    libraries = {f"version of {name}": version for name, version in versions().items() if name != "python"}
    return {**libraries, f"code of {LIBRARY}": digest(code)}


def job_code(module) -> dict:
    """{file: its hash} of the scripts that define a training module's methods."""
    written = [part for part in type(module).__mro__ if part.__module__.partition(".")[0] not in (LIBRARY, "paddle")]
    functions = [value for part in written for value in vars(part).values() if inspect.isfunction(value)]
    files = {Path(inspect.getfile(function)) for function in functions}
    return {f"code of {file.name}": digest(file.read_bytes()) for file in sorted(files) if file.is_file()}


def public_arguments(args) -> dict:
    """The flags without secrets, which may be written to files and trackers."""
    public = {name: value for name, value in vars(args).items() if name not in SECRETS}
    return {name: hide_tokens(value) if isinstance(value, str) else value for name, value in public.items()}


def public_command(args) -> str:
    """The command line without secrets."""
    command = shlex.join(sys.argv)
    for name in SECRETS:
        if getattr(args, name):
            command = command.replace(getattr(args, name), "***")
    return hide_tokens(command)


def run_identity(module, dataset, args, saved, samples_per_step: int) -> dict:
    """The identity of a run. A checkpoint to resume from must have the same: else samples would differ."""
    identity = {"job": type(module).__name__, "seed": args.seed, "rows": len(dataset)}
    if hasattr(args, "dataset_split"):  # a job's own data may have no flags
        identity["split"] = args.dataset_split
    if hasattr(dataset, "digest"):
        identity["data"] = dataset.digest()
    identity["repeats"] = describe_repeats(getattr(dataset, "times", None))
    saved = {"repeats": describe_repeats(None), **saved} if saved else saved  # older versions had no such flag
    if hasattr(dataset, "lanes"):
        identity["lanes"] = len(dataset.lanes)
    if getattr(dataset, "facts", None):
        identity["images"] = dataset.images_digest()
    if module.buckets:  # then the order of samples depends on it
        identity["samples_per_step"] = samples_per_step
    words = {
        "seed": "--seed",
        "split": "--dataset_split",
        "rows": "number of samples",
        "data": "data (a hash of all captions, or of a stream's addresses)",
        "lanes": "--stream_lanes",
        "repeats": "--repeats",
        "images": "images (a hash of the contents of all)",
        "samples_per_step": "number of samples per step",
    }
    for name, value in identity.items():
        is_of_older_version = name in ("images", "lanes", "split") and name not in saved  # then it was not known
        if saved and saved.get(name) != value and not is_of_older_version:
            raise UserError(
                f"--resume_from_checkpoint: {args.resume_from_checkpoint!r} is of another run: its "
                f"{words.get(name, name)} is {saved.get(name)}, here it is {value}"
            )
    return identity


def describe_repeats(times) -> str:
    """How often an epoch uses each row, in words that are others for other numbers."""
    return "not given" if times is None else f"for {times.sum()} samples per epoch ({digest(times.tobytes())})"


def versions() -> dict:
    """The versions of the libraries that the result depends on."""
    import ppdiffusers

    return {
        "python": platform.python_version(),
        "paddle": paddle.__version__,
        "ppdiffusers": ppdiffusers.__version__,
        "ppdiffusers_train": __version__,
    }
