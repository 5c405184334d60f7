"""Checks before training that all ranks have the same flags, code, data and models; a message names a difference."""

import hashlib
import json
import math
import os
import tempfile
import time
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import paddle

from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.runtime.distributed import Ranks

SHOWN = 80  # characters of a value in a message
SAMPLED = 2**16  # elements of a tensor that are compared; all of a smaller tensor
FILE_SECONDS = 3  # after which a file written by another machine should be visible on a network disk


def agree(ranks: Ranks, values: dict) -> None:
    """Compare the ranks' values of each name.

    Args:
        values: {flag, file or model: this rank's value, as JSON}.
    Raises:
        UserError: the same on every rank; it names the first difference.
    """
    message = disagreement(ranks.gather_objects(values, "the others to load what is compared"))
    if message:
        raise UserError(message)


def found_by_main(ranks: Ranks, find):
    """What `find()` returns on rank 0, which alone calls it, on every rank; so is a `UserError` that it raises."""
    value, mistake = None, ""
    if ranks.is_main:
        try:
            value = find()
        except UserError as error:
            mistake = str(error)
    value, mistake = ranks.broadcast_object((value, mistake))
    if mistake:
        raise UserError(mistake)
    return value


def disagreement(values_of_ranks: list) -> str:
    """A line about the first value in which a rank differs from rank 0; empty if all agree.

    Args:
        values_of_ranks: {name: value} of each rank. A name that only some ranks have is a difference, too.
    """
    for name in dict.fromkeys(chain.from_iterable(values_of_ranks)):
        texts = [
            json.dumps(values[name], ensure_ascii=False) if name in values else "nothing" for values in values_of_ranks
        ]
        for rank, text in enumerate(texts):
            if text != texts[0]:
                other, first = shortened(text, texts[0])
                return f"{name}: rank {rank} has {other}, rank 0 has {first}; expected the same on all ranks"
    return ""


def digest(content: bytes) -> str:
    """A short hash."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def shortened(*texts: str) -> list:
    """Texts shortened to fit into a line: of long ones, the part that begins shortly before they differ."""
    start = len(os.path.commonprefix(texts)) - SHOWN // 3
    if start <= 0 or max(map(len, texts)) <= SHOWN:
        start = 0
    parts = [("…" if start else "") + text[start : start + SHOWN] for text in texts]
    return [f"{part}…" if len(text) > start + SHOWN else part for part, text in zip(parts, texts)]


@paddle.no_grad()
def model_digests(module) -> dict:
    """{name of a model in a module: a hash of all its parameters and buffers, and of its configuration}.

    Names, shapes, dtypes and bytes count: all bytes of a tensor of at most `SAMPLED` elements, and those of about as
    many evenly spread elements of a larger one, which are picked on its device. Bytes are hashed rather than sums,
    because each device adds in an order of its own.
    """
    digests = {}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        model = digests.setdefault(name.split(".")[0], hashlib.blake2b(digest_size=8))
        model.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        step = max(tensor.size // SAMPLED, 1)
        while (
            math.gcd(step, tensor.size) > 1
        ):  # no common factor: the sample has elements of every row, column and channel
            step += 1
        if tensor.size:
            # Clone first: from a view, Paddle would copy the whole tensor to the host.
            model.update((tensor.flatten()[::step].clone() if step > 1 else tensor).numpy().tobytes())
    weights = {f"weights of {name}": model.hexdigest() for name, model in digests.items()}
    parts = {**vars(module), **dict(module.named_children())}
    settings = {f"settings of {name}": settings_of(part) for name, part in parts.items()}
    return {**weights, **{name: found for name, found in settings.items() if found}}


def settings_of(part):
    """The settings of a model, scheduler, tokenizer or image processor, as JSON; a list for a list of them; empty for
    anything else.

    Without the entries that name its origin and the library that wrote it.
    """
    if isinstance(part, (list, tuple)):
        return [found for found in map(settings_of, part) if found]
    found = getattr(part, "config", part if hasattr(part, "to_dict") else None)
    found = found.to_dict() if hasattr(found, "to_dict") else found
    settings = dict(found) if isinstance(found, dict) else {}
    hidden = ("_", "name_or_path", "architectures")
    settings = {key: value for key, value in settings.items() if not key.startswith(hidden) and "version" not in key}
    if hasattr(part, "get_vocab"):
        vocabulary = sorted((token, int(number)) for token, number in part.get_vocab().items())
        settings["vocabulary"] = digest(json.dumps(vocabulary).encode())
        settings["model_max_length"] = part.model_max_length
    return json.loads(json.dumps(settings, sort_keys=True, default=str))


def ranks_elsewhere(folder: Path, ranks: Ranks) -> list:
    """The ranks for which `folder` is another folder than for rank 0, even if it has the same name: they do not see a
    temporary file that rank 0 creates in it."""
    with (
        writing("a temporary file", folder),
        tempfile.TemporaryDirectory(prefix=".same-for-all-", dir=folder) if ranks.is_main else nullcontext("") as made,
    ):
        name = ranks.broadcast_object(os.path.basename(made))
        deadline = time.monotonic() + FILE_SECONDS
        while not (sees := (folder / name).exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [rank for rank, sees_it in enumerate(ranks.gather_objects(sees)) if not sees_it]
