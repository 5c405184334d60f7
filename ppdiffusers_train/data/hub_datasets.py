"""Downloads datasets of the hub whose images are files or in zip archives; they are then read like any other folder."""

import os

import huggingface_hub

from ppdiffusers_train.data.archives import is_archive
from ppdiffusers_train.data.folder_files import is_image
from ppdiffusers_train.data.folder_kinds import ARROW_FORMATS, has_configurations


def image_repository(name: str, cache_dir):
    """The folder of a downloaded dataset of the hub, or None for a dataset that the library `datasets` has to load.

    That is one of tables that hold their images, one whose README lists its files, and one that cannot be reached,
    which `datasets` may have in its own cache.
    """
    try:
        files = huggingface_hub.HfApi().list_repo_files(name, repo_type="dataset")
    except (OSError, ValueError, huggingface_hub.errors.HTTPError):
        return downloaded_before(name, cache_dir)
    if not are_images(name, files):
        return None
    if "README.md" in files:
        readme = huggingface_hub.hf_hub_download(name, "README.md", repo_type="dataset", cache_dir=cache_dir)
        if has_configurations(os.path.dirname(readme)):
            return None
    return download(name, cache_dir)


def download(name: str, cache_dir, **options) -> str:
    """The folder with all files of a dataset of the hub."""
    return huggingface_hub.snapshot_download(name, repo_type="dataset", cache_dir=cache_dir, **options)


def downloaded_before(name: str, cache_dir):
    """The folder of a dataset that `image_repository` has downloaded before, or None."""
    try:
        folder = huggingface_hub.snapshot_download(
            name, repo_type="dataset", cache_dir=cache_dir, local_files_only=True
        )
    except (OSError, ValueError):
        return None
    files = [os.path.relpath(os.path.join(root, file), folder) for root, _, found in os.walk(folder) for file in found]
    return folder if are_images(name, files) and not has_configurations(folder) else None


def are_images(name: str, files: list) -> bool:
    """Whether a dataset with these files has its images in files or archives, and no script that loads it."""
    if f"{name.rpartition('/')[2]}.py" in files:
        return False
    holds_tables = any(file.lower().endswith(ARROW_FORMATS) for file in files)
    return any(map(is_archive, files)) or (any(map(is_image, files)) and not holds_tables)
