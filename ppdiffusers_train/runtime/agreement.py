"""What the ranks of a run have to agree on before they train together: told, compared, and named where it differs."""

import hashlib
import json
import math
import os
import tempfile
import time
from itertools import chain
from pathlib import Path

import paddle

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.runtime.distributed import Ranks

SHOWN = 80  # characters of a value in a message
SAMPLED = 2**16  # numbers of a tensor that are compared; all of a smaller one
FILE_SECONDS = 3  # after which a file that another machine has written is seen through a network, if ever


def agree(ranks: Ranks, values: dict) -> None:
    """Compare what the ranks have under each name.

    Args:
        values: {flag, file or model: what this rank has there, which JSON can hold}.
    Raises:
        UserError: on every rank the same, which names the first thing that differs.
    """
    message = disagreement(ranks.gather_objects(values, "the others to load what is compared"))
    if message:
        raise UserError(message)


def disagreement(told: list) -> str:
    """The first of the things in which a rank differs from rank 0, as a line; empty where all agree.

    Args:
        told: for each rank its {name: value}. A name that only some of them have counts, too.
    """
    for name in dict.fromkeys(chain.from_iterable(told)):
        texts = [json.dumps(values[name], ensure_ascii=False) if name in values else "nothing" for values in told]
        for rank, text in enumerate(texts):
            if text != texts[0]:
                other, first = shortened(text, texts[0])
                return f"{name}: rank {rank} has {other}, rank 0 has {first}; expected the same on all ranks"
    return ""


def digest(content: bytes) -> str:
    """A short hash."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def shortened(*texts: str) -> list:
    """Texts as they fit into a line: of long ones the part from shortly before they differ."""
    start = len(os.path.commonprefix(texts)) - SHOWN // 3
    if start <= 0 or max(map(len, texts)) <= SHOWN:
        start = 0
    parts = [("…" if start else "") + text[start : start + SHOWN] for text in texts]
    return [f"{part}…" if len(text) > start + SHOWN else part for part, text in zip(parts, texts)]


@paddle.no_grad()
def model_digests(module) -> dict:
    """{name of a model in a module: a hash of all its parameters and buffers, and of its configuration}.

    Names, shapes, types and bytes count: of a tensor of at most `SAMPLED` numbers all, of a larger one about as many,
    evenly spread, which are picked on its device. Bytes, as each device adds up in an order of its own.
    """
    digests = {}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        model = digests.setdefault(name.split(".")[0], hashlib.blake2b(digest_size=8))
        model.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        step = max(tensor.size // SAMPLED, 1)
        while math.gcd(step, tensor.size) > 1:  # none in common: the sample meets every row, column and channel
            step += 1
        if tensor.size:
            # The copy is that of the few: Paddle would copy the whole tensor for a view of it.
            model.update((tensor.flatten()[::step].clone() if step > 1 else tensor).numpy().tobytes())
    told = {f"weights of {name}": model.hexdigest() for name, model in digests.items()}
    parts = {**vars(module), **dict(module.named_children())}
    settings = {f"settings of {name}": settings_of(part) for name, part in parts.items()}
    return {**told, **{name: found for name, found in settings.items() if found}}


def settings_of(part):
    """What a model, scheduler, tokenizer or image processor depends on besides weights, as JSON; of a list of them a
    list; nothing of others.

    Without what says where it came from and which library has written it.
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
    """The ranks to which `folder` is another one than to rank 0, though it may have the same name: a file that rank 0
    makes in it for a moment is not in theirs."""
    with tempfile.TemporaryDirectory(prefix=".same-for-all-", dir=folder if ranks.is_main else None) as made:
        name = ranks.broadcast_object(os.path.basename(made))
        deadline = time.monotonic() + FILE_SECONDS
        while not (sees := (folder / name).exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [rank for rank, sees_it in enumerate(ranks.gather_objects(sees)) if not sees_it]
