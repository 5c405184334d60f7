"""Lists the samples in a cache, and finds those that given data does not need, for `ppdiffusers-train cache`."""

import contextlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppdiffusers_train.data.arrow_files import remove_leftovers
from ppdiffusers_train.data.dataset import index_folder
from ppdiffusers_train.data.encoded_cache import entry_key
from ppdiffusers_train.data.encoders_key import ABOUT, read_about
from ppdiffusers_train.data.image_index import index_images
from ppdiffusers_train.data.pack_writer import rewrite
from ppdiffusers_train.data.packs import as_keys, open_packs
from ppdiffusers_train.data.rows import Rows
from ppdiffusers_train.errors import BadSampleError, UserError, writing
from ppdiffusers_train.runtime.distributed import Ranks
from ppdiffusers_train.tools.source_flags import FLAGS
from ppdiffusers_train.tools.sources import open_source

FOLDER = re.compile(r"[0-9a-f]{32}(-compiled)?")
OLD_FILES = "[0-9a-f][0-9a-f]/*.safetensors"  # written by older versions


@dataclass
class Encoded:
    """The samples of one set of encoders in a cache.

    Args:
        folder: the folder of these encoders.
        packs: its packs.
        damaged: files in it that are not valid packs of this folder.
        old: files with samples of an older version.
        about: the contents of `encoders_key.ABOUT`: the job and the settings that encoded the samples; or {}.
    """

    folder: Path
    packs: list
    damaged: list
    old: list
    about: dict

    @property
    def keys(self) -> np.ndarray:
        """The keys of all samples, sorted and without repetitions: "S16" [n]."""
        return np.unique(joined(pack.keys for pack in self.packs))

    def as_json(self, needed) -> dict:
        """A summary. `needed` are the keys that the data needs, sorted, or None if no data was named."""
        files = [Path(pack.file) for pack in self.packs] + self.damaged + self.old
        found = {
            "folder": str(self.folder),
            "about": self.about,
            "samples": len(self.keys),
            "packs": len(self.packs),
            "bytes": sum(file.stat().st_size for file in files),
            "damaged": [str(file) for file in self.damaged],
            "samples_of_an_older_version": len(self.old),
        }
        return found if needed is None else {**found, "not_needed": int((~np.isin(self.keys, needed)).sum())}

    def prune(self, needed: np.ndarray) -> None:
        """Remove the samples that are not needed, and the folder if nothing is left.

        Raises:
            RunError, OSError: a file cannot be read, written or removed; no needed sample is lost.
        """
        remove_leftovers(self.folder)
        packs = [pack for pack in self.packs if not np.isin(pack.keys, needed).all()]
        if packs:
            rewrite(self.folder, packs, lambda keys: np.isin(keys, needed))
        with writing("--prune: the cache", self.folder, "what is needed is still there"):
            for file in self.damaged + self.old:
                file.unlink(missing_ok=True)
            for part in {file.parent for file in self.old}:
                part.rmdir()
            if {file.name for file in self.folder.iterdir()} <= {ABOUT}:
                (self.folder / ABOUT).unlink(missing_ok=True)
                self.folder.rmdir()


def list_encoded(root: Path) -> list:
    """The `Encoded` of each set of encoders in a cache.

    Raises:
        UserError: there is no cache, or it cannot be read.
    """
    found = []
    try:
        for folder in sorted(filter(Path.is_dir, root.iterdir())):
            if FOLDER.fullmatch(folder.name):
                packs, damaged = open_packs(folder)
                found.append(Encoded(folder, packs, damaged, sorted(folder.glob(OLD_FILES)), read_about(folder)))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(root)!r} cannot be read: {error}") from error
    if not found:
        raise UserError(f"{str(root)!r} holds no encoded samples; expected a folder of --encoded_cache_dir")
    return found


def held_keys(everything: list) -> np.ndarray:
    """All keys of several `Encoded`."""
    return joined(encoded.keys for encoded in everything)


def joined(arrays) -> np.ndarray:
    """Several arrays of keys as one."""
    return np.concatenate([np.empty(0, "S16"), *arrays])


def needed_keys(args, held: np.ndarray) -> np.ndarray:
    """The keys in the cache (`held`) that the data needs, sorted.

    The number of variants of a sample is not stored. They are numbered from 0, so the search ends at the first number
    that no sample of the cache has.
    """
    needed = []
    for name in args.train_data_dir:
        samples = list(samples_of(name, args))
        for variant in itertools.count():
            keys = as_keys(entry_key(digest, caption, variant) for digest, caption in samples)
            found = keys[np.isin(keys, held)]
            if not len(found):
                break
            needed.append(found)
    return np.unique(joined(needed))


def samples_of(name: str, args):
    """Yield (hash of the image, caption) of all samples of the data that `name` names.

    Raises:
        UserError: it cannot be trained on.
    """
    flags = {name: getattr(args, name, None) for name in FLAGS}
    source = open_source(name, args.image_column, args.caption_column, **flags)
    refused = [text for kind, text in source.problems if kind == "refused"]
    if refused or not isinstance(source.rows, Rows) or not len(source.rows):
        raise UserError(f"--train_data_dir: {refused[0] if refused else f'{name!r} holds no samples for training'}")
    index_images(source.rows, Ranks(0, 1), index_folder(args))
    for row in range(len(source.rows)):
        with contextlib.suppress(BadSampleError):  # training does not encode it either
            captions, digest = source.rows.captions(row), source.rows.image_digest(row)
            yield from ((digest, caption) for caption in captions)


def as_text(folder: str, found: list, is_pruned: bool) -> str:
    """The result as text."""
    samples, size = (sum(encoded[name] for encoded in found) for name in ("samples", "bytes"))
    lines = [f"{folder}: {samples:,} samples of {len(found)} sets of encoders, {size / 1e6:,.1f} MB"]
    for encoded in found:
        about = encoded["about"]
        lines.append(
            f"\n{Path(encoded['folder']).name}\n  {encoded['samples']:,} samples in {encoded['packs']:,} packs, "
            f"{encoded['bytes'] / 1e6:,.1f} MB"
        )
        if about:
            settings = ", ".join(f"{name} {value}" for name, value in about["settings"].items())
            lines.append(f"  {about['job']}: {', '.join(about['encoders'])}; {settings}")
        for file in encoded["damaged"]:
            lines.append(f"  {Path(file).name}: damaged, or of another folder; it is not used")
        if encoded["samples_of_an_older_version"]:
            lines.append(
                f"  {encoded['samples_of_an_older_version']:,} samples of an older version, which are not used"
            )
        if "not_needed" in encoded:
            lines.append(f"  {encoded['not_needed']:,} samples are not needed by the data")
    if is_pruned:
        lines.append("\nremoved what is not needed")
    return "\n".join(lines)
