"""The key of the encoders in a cache of encoded samples: code, settings, precision, versions and weights.

Jobs that encode alike have the same key, so they share samples.
"""

import contextlib
import hashlib
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ppdiffusers_train.cpu.patches import COMPILE_FROM_ROWS, can_compile
from ppdiffusers_train.data.arrow_files import atomic_file
from ppdiffusers_train.data.inspection import TICK_SECONDS
from ppdiffusers_train.data.pixels import WHITE, decode
from ppdiffusers_train.data.rows import stamp_of
from ppdiffusers_train.data.source_code import code_of, names_in
from ppdiffusers_train.draws import RowDraws
from ppdiffusers_train.errors import writing
from ppdiffusers_train.module import encode_alone

FORMAT = 4  # of the cache's files and keys
ABOUT = "about.json"  # what has encoded the samples of a folder
WEIGHTS, BLOCK = "weights.json", 1 << 22  # hashes of files with weights; bytes that are read at a time
LIBRARIES = ("ppdiffusers", "paddlenlp", "pillow")
# An encoded sample is the result of these methods of a training module, and of what they are called with and by.
METHODS, AROUND = ("preprocess", "encode"), (decode, RowDraws, encode_alone)


def encoders_folder(root: Path, digest: str, module, rows: int) -> tuple:
    """(the cache's folder of the encoders with this digest, whether they are compiled for it).

    Compiled encoders round differently, so a cache keeps the kind that it was started with, also when its data grows.
    """
    plain = root / digest
    compiled = plain.with_name(f"{plain.name}-compiled")
    if can_compile(module) and not plain.exists() and (compiled.exists() or rows >= COMPILE_FROM_ROWS):
        return compiled, True
    return plain, False


def unloaded_encoders(module, index_dir: Path) -> dict:
    """{name: a hash of its files} of the encoders that are not loaded yet.

    Args:
        index_dir: the folder of all indices.
    """
    names = set(module.encoders) & set(module.not_loaded())
    return {name: file_digest(module.stored()[name].files, index_dir) for name in sorted(names)}


def stored_digests(module, index_dir: Path) -> dict:
    """The same of all models that are loaded later, or were, with the names of `agreement.model_digests`."""
    return {f"weights of {name}": file_digest(stored.files, index_dir) for name, stored in module.stored().items()}


def encoders_digest(module, precision, unloaded: dict, background: str = WHITE, masks=None) -> str:
    """A hash of everything that an encoding depends on besides the sample.

    Args:
        unloaded: the result of `unloaded_encoders`.
        background: colour behind transparent pixels of images.
        masks: "alpha", "file", or None without masks; their contents are part of a sample's key.
    """
    known = {
        "masks": masks,
        "code": code_of(type(module), METHODS, AROUND),
        "settings": encoders_settings(module, precision),
        "background": background,
    }
    return digest_of(known, module, module.encoders, unloaded)


def shared_digests(module, precision, unloaded: dict) -> dict:
    """{method of `module.shared`: a hash of everything that its result depends on besides what it takes}."""
    digests = {}
    for method in module.shared:
        names = [name for name in module.encoders if name in names_in(getattr(type(module), method).__code__)]
        known = {"code": code_of(type(module), (method,)), "precision": kind_of(module, precision, names)}
        digests[method] = digest_of(known, module, names, unloaded)
    return digests


def digest_of(known: dict, module, names, unloaded: dict) -> str:
    """A hash of what is known, of the versions of libraries, and of the weights of the encoders `names`."""
    known = {"format": FORMAT, "versions": {library: version(library) for library in LIBRARIES}, **known}
    digest = hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16)
    for name in names:
        if name in unloaded:
            digest.update(f"{name} {unloaded[name]}".encode())
            continue
        for key, tensor in sorted(getattr(module, name).state_dict().items()):
            array = tensor.numpy()
            digest.update(f"{name}.{key} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def encoders_settings(module, precision) -> dict:
    """The precision and the settings that an encoding depends on, as JSON."""
    return {**kind_of(module, precision, module.encoders), **module.encoding_settings()}


def kind_of(module, precision, names) -> dict:
    """The precision in which the encoders `names` compute, as JSON."""
    if not precision.enabled:
        return {"precision": "no"}
    kept = sorted({*module.keep_float32, *module.keep_float32_in_fp16} & {*names})
    return {"precision": f"{precision.mixed_precision} {precision.level}", "keep_float32": kept}


def file_digest(files, index_dir: Path) -> str:
    """A hash of the contents of files. A file that has not changed since an earlier start is not read again."""
    record = index_dir / WEIGHTS
    try:
        known = json.loads(record.read_text("utf-8"))
    except (OSError, ValueError):  # none, or a damaged one
        known = {}
    digests, new = [], {}
    for file in files:
        with open(file, "rb") as opened:
            stat = os.fstat(opened.fileno())
            stamp = stamp_of(stat).hex()
            digests.append(known.get(stamp) or content_digest_of(opened))
        if time.time() - stat.st_ctime > TICK_SECONDS:  # else it may change again without getting another time stamp
            new[stamp] = digests[-1]
    if new.items() - known.items():
        write_record(record, {**known, **new})
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def content_digest_of(opened) -> str:
    """The hash of an open file's content."""
    digest = hashlib.blake2b(digest_size=16)
    for block in iter(lambda: opened.read(BLOCK), b""):
        digest.update(block)
    return digest.hexdigest()


def write_record(file: Path, known: dict) -> None:
    """Write what is known of weights. Nothing is lost where that fails, but the time to read them again."""
    with contextlib.suppress(OSError), atomic_file(file) as temporary:
        temporary.write_text(json.dumps(known, indent=1), "utf-8")


def describe_encoders(folder: Path, module, precision, shared: dict) -> None:
    """Write into the folder of these encoders what has encoded its samples. `shared` are their `shared_digests`."""
    about = {"job": type(module).__name__, "encoders": list(module.encoders), "shared": shared}
    text = json.dumps({**about, "settings": encoders_settings(module, precision)}, indent=1, ensure_ascii=False)
    with writing("--encoded_cache_dir: encoded samples", folder, "those in it stay usable"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ABOUT).write_text(text + "\n", encoding="utf-8")


def read_about(folder: Path) -> dict:
    """What `describe_encoders` wrote into a folder, or {}."""
    try:
        return json.loads((folder / ABOUT).read_text("utf-8"))
    except (OSError, ValueError):  # none, or a damaged one
        return {}
