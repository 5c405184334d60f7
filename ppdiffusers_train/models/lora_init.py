"""LoRA files in models: initial values of a run's layers, and a result in a pipeline's models."""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import paddle

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.lora_files import find_lora, read_lora
from ppdiffusers_train.models.lora_names import LAYERS_PER_BLOCK, NAMES
from ppdiffusers_train.models.lora_svd import flat, resized
from ppdiffusers_train.tensor_files import as_array, open_tensors

FULL_FILE = "trainable_modules.safetensors"


class LoRASource:
    """A LoRA's file, with the file of parameters that were trained in full beside it.

    Args:
        path: the file, or its folder. flag: the flag that named it, for messages.
        model: the UNet, prior or transformer. text_encoders: {name: text encoder}.
    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, path, flag: str, model, text_encoders: dict):
        self.file, self.flag = find_lora(path, flag), flag
        self.models = {**dict.fromkeys(NAMES, model), **text_encoders}
        self.full_file = find_full(self.file, path)
        with named(flag):
            self.updates = read_lora(self.file, layers_per_block(model))

    def error(self, found: str) -> UserError:
        return UserError(f"{self.flag}: {self.file} {found}")

    def by_model(self) -> dict:
        """{name of a model in the file: {layer: Update}}."""
        found = {}
        for layer, update in self.updates.items():
            component, _, name = layer.partition(".")
            found.setdefault(component, {})[name] = update
        return found

    def full(self) -> dict:
        """{name of a model: {parameter: array in Paddle's layout}} of the parameters that were trained in full.

        Raises:
            UserError: a model has no such parameter.
        """
        if not self.full_file:
            return {}
        with named(self.flag):
            tensors, metadata = open_tensors(self.full_file)
        found = {}
        for key, tensor in tensors.items():
            component, _, name = key.partition(".")
            own = self.models[component].state_dict() if component in self.models else {}
            array = as_array(tensor)
            if metadata.get("format") == "pt" and is_linear(self.models.get(component), name):
                array = array.T
            if name not in own:
                raise UserError(f"{self.flag}: {self.full_file} holds {key}, which is no parameter of this model")
            if list(own[name].shape) != list(array.shape):
                shapes = f"{list(array.shape)}, expected {list(own[name].shape)}"
                raise UserError(f"{self.flag}: {self.full_file} has {key} of {shapes}; it fits another model")
            if not np.isfinite(array.astype(np.float32)).all():
                raise UserError(f"{self.flag}: {self.full_file} has NaN or inf in {key}")
            found.setdefault(component, {})[name] = array
        return found

    def digest(self) -> str:
        """A hash of the files."""
        found = hashlib.blake2b(digest_size=8)
        for file in filter(None, (self.file, self.full_file)):
            with open(file, "rb") as opened:
                while piece := opened.read(2**24):
                    found.update(piece)
        return found.hexdigest()


def find_full(file: Path, path):
    """The file of parameters that were trained in full beside a LoRA that was named by its folder; None if there is
    none. One that a run's result does not list was left by another run.
    """
    found = file.with_name(FULL_FILE)
    if not Path(path).is_dir() or not found.is_file():
        return None
    try:
        listed = json.loads(found.with_name("result.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):  # no result of a run, such as a checkpoint
        return found
    return found if FULL_FILE in listed else None


@contextlib.contextmanager
def named(flag: str):
    """A context in which errors about a file begin with the flag that named it."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(f"{flag}: ") else f"{flag}: {error}") from error


def layers_per_block(model) -> int:
    """That of a UNet's configuration; the usual number for other models."""
    found = getattr(getattr(model, "config", None), "layers_per_block", None)
    return found if isinstance(found, int) else LAYERS_PER_BLOCK


def is_linear(model, parameter: str) -> bool:
    """Whether a parameter is the matrix of a linear layer, which torch stores transposed."""
    layers, (layer, _, kind) = dict(model.named_sublayers()) if model else {}, parameter.rpartition(".")
    return kind == "weight" and isinstance(layers.get(layer), paddle.nn.Linear)


def initialize(source: LoRASource, layers: dict, trained: dict, targets: str, log) -> None:
    """Give a run's layers the values of a file, so that they compute the same.

    Args:
        layers: {name of a model: {layer: LoRA layer}} of the run; the UNet, prior or transformer is called "".
        trained: {name of a model: {parameter: tensor}} of what the run trains in full.
        targets: `--lora_target_modules`. log: prints a line.
    Raises:
        UserError: the file has a layer that the model does not have, or that the run does not train.
    """
    missing, shares, ranks = {f"{m}.{n}" if m else n for m, own in layers.items() for n in own}, [], set()
    for component, updates in source.by_model().items():
        model = "" if component in NAMES else component
        if model not in layers:
            log(f"{source.flag}: {len(updates)} layers of {component} are left out, because this run does not train it")
            continue
        known = dict(source.models[component].named_sublayers())
        for name, update in updates.items():
            if name not in layers[model]:
                raise source.error(f"has the layer {name}, {how_to_train(name, known, targets)}")
            lora = layers[model][name]
            rank = lora.up.weight.shape[0 if lora.up.weight.ndim == 2 else 1]
            shares.append(set_values(source, name, lora, update, rank))
            if update.rank != rank:
                ranks.add((update.rank, rank))
            missing.discard(f"{model}.{name}" if model else name)
    if len(missing) == sum(map(len, layers.values())):
        raise source.error("has no layer that this run trains")
    for before, now in sorted(ranks):
        way = "padded with zeros" if before < now else f"truncated by SVD; at most {max(shares):.1%} of a norm is lost"
        log(f"{source.flag}: rank {before} -> {now}, {way}")
    total = sum(map(len, layers.values()))
    log(f"{source.flag}: {total - len(missing)} of {total} layers start from {source.file}")
    if missing:
        log(f"{source.flag}: the file lacks {len(missing)} layers, such as {min(missing)}, which start at zero")
    set_full(source, trained)


def how_to_train(name: str, known: dict, targets: str) -> str:
    """The end of a message about a layer that a run does not train."""
    if name not in known:
        return "which this model does not have; expected a LoRA of the same model"
    ends = name.split(".")
    end = ".".join(ends[-2 if ends[-1].isdigit() else -1 :])
    return f"which this run does not train; expected --lora_target_modules {targets},{end}"


@paddle.no_grad()
def set_values(source: LoRASource, name: str, lora, update, rank: int) -> float:
    """Let a LoRA layer compute an update, whatever its α; returns the share of the update's norm that is lost."""
    is_linear = lora.down.weight.ndim == 2
    initial = lora.down.weight.numpy().T if is_linear else lora.down.weight.numpy()
    initial, width = initial.reshape(rank, -1), lora.up.weight.shape[1 if is_linear else 0]
    if update.shape != (width, initial.shape[1]):
        expected = [width, initial.shape[1]]
        raise source.error(f"has {name} of {list(update.shape)} (out, in), expected {expected}; it fits another model")
    lost = 0.0
    if update.rank != rank:
        update, lost = resized(update, rank)
    own_scale = 1.0 if lora.network_alpha is None else lora.network_alpha / rank
    down, up = (matrix.copy() for matrix in flat(update))
    unused = ~down.any(axis=1)  # as after padding: with zeros on both sides, neither would ever have a gradient
    down[unused], up[:, unused] = initial[unused], 0
    up = up * np.float32(update.scale / own_scale)
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise source.error(f"has NaN or inf in {name}")
    down, up = (down.T, up.T) if is_linear else (down, up)
    lora.down.weight.set_value(np.ascontiguousarray(down).reshape(lora.down.weight.shape))
    lora.up.weight.set_value(np.ascontiguousarray(up).reshape(lora.up.weight.shape))
    return lost


@paddle.no_grad()
def set_full(source: LoRASource, trained: dict) -> None:
    """Set parameters that are trained in full to their values in the second file.

    Raises:
        UserError: the run does not train one of them, and its result would lack it.
    """
    for component, arrays in source.full().items():
        own = trained.get("" if component in NAMES else component, {})
        for name, array in arrays.items():
            if name not in own:
                raise UserError(
                    f"{source.flag}: {source.full_file} holds {name}, which this run does not train; expected "
                    f"--trainable_modules with {name}, as in the run that wrote it, or the LoRA's file by itself"
                )
            own[name].set_value(array.astype(np.float32))
