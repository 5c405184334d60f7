"""Models of the hub as folders on this disk: downloaded, or from the cache where the hub cannot be reached."""

import os
from pathlib import Path

import huggingface_hub

from ppdiffusers_train.models.weight_files import choose_weights, is_weights, parse_name

UNREACHABLE = (OSError, ValueError, huggingface_hub.errors.HTTPError)
OTHER_WEIGHTS = (".msgpack", ".onnx", ".ckpt", ".pb", ".h5", ".pt", ".pth", ".pkl", ".pdopt")
CODE = (".py", ".pyc", ".so")


def download(name: str, parts, cache_dir=None, revision=None, variant=None, weights=True) -> Path:
    """The folder with the files of a repository that `parts` need; see `files_to_download`.

    Args:
        weights: whether weights are downloaded, too.
    Raises:
        UNREACHABLE: the hub, or the repository on it.
    """
    files = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
    wanted = files_to_download(files, parts, variant)
    if not weights:
        wanted = [file for file in wanted if not is_weights(file)]
    options = {"revision": revision, "cache_dir": cache_dir}
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, **options))


def cached(name: str, cache_dir=None, revision=None):
    """The folder of what was downloaded of a repository before, by this or another program, or None.

    It is looked for in `cache_dir`, and in the hub's own cache (`HF_HUB_CACHE`, or `hub` in `HF_HOME`).
    """
    for place in dict.fromkeys((cache_dir, None)):
        try:
            options = {"revision": revision, "cache_dir": place, "local_files_only": True}
            return Path(huggingface_hub.snapshot_download(name, **options))
        except UNREACHABLE:
            continue
    return None


def files_to_download(files, parts, variant=None):
    """The files of `parts` in a repository, with one kind of weights each: Paddle's, else safetensors, else pickled.

    Args:
        files: names in the repository.
        parts: folders in it; "" is its top.
        variant: preferred variant of the weights, such as `fp16`.
    """
    chosen = [name for name in files if name == "model_index.json"]
    for part in parts:
        inside = [name for name in files if os.path.dirname(name) == part and name not in chosen]
        own = {os.path.basename(name): name for name in inside}
        weights = choose_weights(own, variant)
        if any(parse_name(name).is_index for name in weights):  # both whole and sharded: take the shards
            weights = [name for name in weights if parse_name(name).is_index or parse_name(name).shard]
        chosen += [own[name] for name in own if not is_other(name)] + [own[name] for name in weights]
    return chosen


def is_other(name: str) -> bool:
    """Whether a file is none of a part's configuration: weights, also those for other programs, a pickle, or code."""
    return is_weights(name) or name.endswith((*OTHER_WEIGHTS, *CODE))


def reason_of(error: Exception) -> str:
    """Why the hub cannot be reached, on one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
