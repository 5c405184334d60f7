"""The identity of a run: seed, flags and versions, which are written into its folder and its checkpoints."""

from ppdiffusers_train import __version__

import inspect
import platform
import shlex
import sys
from pathlib import Path

import paddle

from ppdiffusers_train.errors import UserError, hide_tokens
from ppdiffusers_train.loop.resume_rules import weights_named
from ppdiffusers_train.runtime.agreement import digest

LIBRARY = Path(__file__).parents[1].name
SECRETS = ("hub_token",)
# Paths that may differ between ranks: their contents are compared instead, so each node may have its own copy.
OWN_PLACES = {
    "train_data_dir",
    "dataset_name",
    "train_shards_path_or_url",
    "validation_data_dir",
    "class_data_dir",
    "encoded_cache_dir",
    "pretrained_model_name_or_path",
    "pretrained_decoder_model_name_or_path",
    "pretrained_prior_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "pretrained_teacher_model",
    "single_file_config",
    "validation_prompts_file",
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


DATA = {  # what identifies the data, in words
    "split": "--dataset_split",
    "rows": "number of samples",
    "data": "data (a hash of all captions, or of a stream's addresses)",
    "lanes": "--stream_lanes",
    "repeats": "--repeats",
    "images": "images (a hash of the contents of all)",
}


def run_identity(module, dataset, args, saved, samples_per_step: int) -> dict:
    """The identity of a run. A checkpoint to resume from must have the same: else samples would differ.

    Raises:
        UserError: it has another one, except other data with `--accept_changed_data`.
    """
    identity = {"job": type(module).__name__, "seed": args.seed, **data_identity(dataset, args)}
    if module.buckets:  # then the order of samples depends on both
        identity |= {"samples_per_step": samples_per_step, "buckets": digest(repr(module.buckets).encode())}
    words = {"seed": "--seed", "samples_per_step": "number of samples per step", **DATA}
    words["buckets"] = "sizes of buckets, which depend on --resolution,"
    for name, (before, now) in differences(identity, saved).items():
        if name in DATA and args.accept_changed_data:
            continue
        way_out = "; expected the same, or --accept_changed_data to go on with other data" if name in DATA else ""
        raise UserError(
            f"--resume_from_checkpoint: {args.resume_from_checkpoint!r} is of another run: its "
            f"{words.get(name, name)} is {before}, here it is {now}{way_out}"
        )
    return identity


def initial_weights(module, run) -> dict:
    """Set the initial values that flags ask for; returns the hashes of their files, named as ranks compare them."""
    found = module.initialize((lambda line: None) if run.checkpoint else run.log)
    for flag in found if run.checkpoint else ():
        run.log(f"{flag}: the file is only compared, because the weights are those of the checkpoint")
    return weights_named(found)


def data_identity(dataset, args) -> dict:
    """What identifies the data of a run: a dictionary with keys of `DATA`."""
    identity = {"rows": len(dataset)}
    if hasattr(args, "dataset_split"):  # a job's own data may have no flags
        identity["split"] = args.dataset_split
    if hasattr(dataset, "digest"):
        identity["data"] = dataset.digest()
    identity["repeats"] = describe_repeats(getattr(dataset, "times", None))
    if hasattr(dataset, "lanes"):
        identity["lanes"] = len(dataset.lanes)
    if getattr(dataset, "facts", None):
        identity["images"] = dataset.images_digest()
    return identity


def differences(identity: dict, saved: dict) -> dict:
    """{name: (value in the checkpoint, value now)} of what differs; empty without a checkpoint."""
    if not saved:
        return {}
    # Older versions had no such flag, and did not know the entries below.
    saved = {"repeats": describe_repeats(None), **saved}
    names = [name for name in identity if name in saved or name not in ("images", "lanes", "split", "buckets")]
    return {name: (saved.get(name), identity[name]) for name in names if saved.get(name) != identity[name]}


def without_rows_of_other_data(saved: dict, dataset, args) -> dict:
    """A checkpoint's state, without the numbers of its bad rows if these are rows of other data."""
    if saved and args.accept_changed_data and differences(data_identity(dataset, args), saved):
        return {**saved, "bad_rows": []}
    return saved


def describe_changed_data(identity: dict, saved: dict, position: int, epoch_size: int) -> str:
    """A line about other data than the checkpoint's; empty if it is the same."""
    changed = [DATA[name] for name in differences(identity, saved) if name in DATA]
    if not changed:
        return ""
    return (
        f"--accept_changed_data: other data than the checkpoint's ({', '.join(changed)}); the run goes on by samples "
        f"seen: {position}, which is {position / epoch_size:.2f} epochs of this data"
    )


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
