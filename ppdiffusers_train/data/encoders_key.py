"""What a cache of encoded samples knows its encoders by: code, settings, precision, versions and weights.

Jobs that encode alike have the same key, so they share samples.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ppdiffusers_train.cpu.patches import COMPILE_FROM_ROWS, can_compile
from ppdiffusers_train.data.rows import decode
from ppdiffusers_train.data.source_code import code_of
from ppdiffusers_train.draws import RowDraws
from ppdiffusers_train.module import encode_alone

FORMAT = 3  # of the cache's files and keys
ABOUT = "about.json"  # for people: what has encoded the samples of a folder
LIBRARIES = ("ppdiffusers", "paddlenlp", "pillow")
# An encoded sample is the result of these methods of a training module, and of what they are called with and by.
METHODS, AROUND = ("preprocess", "encode"), (decode, RowDraws, encode_alone)


def encoders_folder(root: Path, module, precision, rows: int) -> tuple:
    """(the cache's folder of these encoders, whether they are compiled for it).

    Compiled encoders round differently, so a cache keeps the kind that it was started with, also when its data grows.
    """
    plain = root / encoders_digest(module, precision)
    compiled = plain.with_name(f"{plain.name}-compiled")
    if can_compile(module) and not plain.exists() and (compiled.exists() or rows >= COMPILE_FROM_ROWS):
        return compiled, True
    return plain, False


def encoders_digest(module, precision) -> str:
    """A hash of everything that an encoding depends on besides the sample."""
    known = {
        "format": FORMAT,
        "code": code_of(type(module), METHODS, AROUND),
        "versions": {library: version(library) for library in LIBRARIES},
        "settings": encoders_settings(module, precision),
    }
    digest = hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16)
    for name in module.encoders:
        for key, tensor in sorted(getattr(module, name).state_dict().items()):
            array = tensor.numpy()
            digest.update(f"{name}.{key} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def encoders_settings(module, precision) -> dict:
    """The precision and the settings that an encoding depends on, as JSON."""
    kind = f"{precision.mixed_precision} {precision.level}" if precision.enabled else "no"
    return {"precision": kind, **module.encoding_settings()}


def describe_encoders(folder: Path, module, precision) -> None:
    """Write into the folder of these encoders what has encoded its samples."""
    about = {"job": type(module).__name__, "encoders": list(module.encoders)}
    text = json.dumps({**about, "settings": encoders_settings(module, precision)}, indent=1, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).write_text(text + "\n", encoding="utf-8")
