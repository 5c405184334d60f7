"""LoRAs added to the weights of a pipeline's folder, and a LoRA taken from the difference of two, a tensor at a time.

Models are built without weights, to see that the files fit them. Files are read and written as they are, so the host
holds one tensor of a model, whatever its size.
"""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.attention import provide_joint_attention
from ppdiffusers_train.models.lora_files import read_lora
from ppdiffusers_train.models.lora_init import find_full, named
from ppdiffusers_train.models.lora_names import LAYERS_PER_BLOCK, NAMES
from ppdiffusers_train.models.lora_svd import computed_later, low_rank, matrix_of
from ppdiffusers_train.models.part_settings import named_class
from ppdiffusers_train.models.pipeline_folder import PipelineFolder
from ppdiffusers_train.models.weight_files import find_weights
from ppdiffusers_train.tensor_files import Computed, Converted, as_array, first_not_finite, open_tensors, write_tensors

# Parts of pipelines that LoRAs are trained on, and what files call them.
PARTS = {
    **{"unet": "unet", "transformer": "transformer", "prior": "unet", "prior_prior": "unet"},
    **{"text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"},
}
# Layers with a matrix that is no linear layer's, by the last word of their names.
TABLES = ("token_embedding", "position_embedding", "class_embedding", "shared", "embed_tokens", "embeddings")


class WholePipeline(PipelineFolder):
    """A pipeline's folder with all its parts, whatever they are; of the hub, with all files of them."""

    def __init__(self, name_or_path, flag, variant=None):
        self._tensors = {}
        provide_joint_attention()  # which the model of SD3 needs to be built
        super().__init__(name_or_path, flag, [])
        entries = {name: entry for name, entry in self.index().items() if isinstance(entry, list) and entry[0]}
        super().__init__(name_or_path, flag, list(entries), variant=variant)

    def tensors(self, part: str) -> dict:
        """{name: tensor} of a part, in torch's layout; {} if it has no weights and its class needs none."""
        if part not in self._tensors:
            self.check_weights(part, self.part_class(part))
            files = self.weights(part)
            found = files.tensors() if files else {}
            self._tensors[part] = {name: in_torch_layout(name, found[name], self.is_torch(part)) for name in found}
        return self._tensors[part]

    def part_class(self, part: str):
        """The class that the pipeline's model_index.json gives a part; None if ppdiffusers has no such class."""
        return named_class(self.index()[part])

    def layers_per_block(self) -> int:
        """That of its UNet; the usual number where it has none."""
        found = self.config("unet").get("layers_per_block") if "unet" in self.folders else None
        return found if isinstance(found, int) else LAYERS_PER_BLOCK


@dataclass
class Change:
    """What LoRAs change in one tensor of a pipeline."""

    updates: list = field(default_factory=list)  # [(scale, Update)]
    full: list = field(default_factory=list)  # [(scale, tensor in torch's layout)] that were trained in full

    def applied_to(self, name: str, array: np.ndarray) -> np.ndarray:
        """The changed tensor, in torch's layout, in its own dtype. A `UserError` if that cannot hold it."""
        value = array.astype(np.float32)
        if not np.isfinite(value).all():
            raise UserError(f"--base: {name} has NaN or inf; expected a base with finite weights")
        total = value.copy()
        for scale, tensor in self.full:
            total += np.float32(scale) * (as_array(tensor).astype(np.float32) - value)
        for scale, update in self.updates:
            total += np.float32(scale) * matrix_of(update).reshape(total.shape)
        with np.errstate(over="ignore"):
            changed = total.astype(array.dtype)
        if not np.isfinite(changed).all():
            raise UserError(f"--lora: {name} would be NaN or inf as {array.dtype}; expected another scale or base")
        return changed


def in_torch_layout(name: str, tensor, is_torch: bool):
    """A tensor of a part's files, as torch stores it."""
    return tensor if is_torch or not is_matrix(name, tensor) else Converted(tensor, tensor.dtype, transposed=True)


def is_matrix(name: str, tensor) -> bool:
    """Whether a tensor is the matrix of a linear layer."""
    layer, _, kind = name.rpartition(".")
    return kind == "weight" and len(tensor.shape) == 2 and layer.rpartition(".")[2] not in TABLES


def add_changes(changes: dict, base: WholePipeline, file: Path, scale: float, path) -> tuple:
    """Add a LoRA times `scale` to what changes in a pipeline.

    Args:
        changes: {part: {tensor: Change}}, which is added to.
        path: what the user named: the file, or its folder; then the parameters trained in full beside it count, too.
    Returns:
        the number of its layers, and of the tensors that were trained in full.
    Raises:
        UserError: it has a layer that the pipeline does not have, or that has another shape there.
    """
    with named("--lora"):
        updates = read_lora(file, base.layers_per_block())
        tensors, metadata = open_tensors(beside) if (beside := find_full(file, path)) else ({}, {})
    for (part, name), update in place(f"--lora: {file}", updates, base).items():
        tensor = base.tensors(part)[name]
        expected = (tensor.shape[0], math.prod(tensor.shape[1:]))
        if update.shape != expected:
            found = f"is of {list(update.shape)} (out, in), {part} has {list(expected)}"
            raise UserError(f"--lora: {file}: {name} {found}; it fits another base model")
        changes.setdefault(part, {}).setdefault(name, Change()).updates.append((scale, update))
    for (part, name), tensor in place(f"--lora: {beside}", tensors, base, end="").items():
        tensor = in_torch_layout(name, tensor, metadata.get("format") == "pt")
        if list(base.tensors(part)[name].shape) != list(tensor.shape):
            raise UserError(f"--lora: {beside}: {name} has another shape in {part}; it fits another base model")
        changes.setdefault(part, {}).setdefault(name, Change()).full.append((scale, tensor))
    return len(updates), len(tensors)


def place(file: str, layers: dict, base: WholePipeline, end: str = ".weight") -> dict:
    """Find the tensors of a pipeline that a LoRA's layers change.

    Args:
        file: for messages. layers: {layer, with the model's name before it: value}. end: of the tensors' names.
    Returns:
        {(part, tensor): value}.
    Raises:
        UserError: a layer is in no part.
    """
    placed = {}
    for component in dict.fromkeys(layer.partition(".")[0] for layer in layers):
        own = {name.partition(".")[2] + end: layers[name] for name in layers if name.partition(".")[0] == component}
        # Files call a transformer or a prior `unet`, too, so the names of their layers tell them apart.
        fits = [part for part in PARTS if PARTS[part] == component or {PARTS[part], component} <= set(NAMES)]
        parts = [part for part in fits if part in base.folders]
        missing = {part: [name for name in own if name not in base.tensors(part)] for part in parts}
        if not missing:
            raise UserError(f"{file}: has layers of {component}, which the base does not have")
        part = min(missing, key=lambda part: len(missing[part]))
        if missing[part]:
            name = missing[part][0].removesuffix(end)
            raise UserError(f"{file}: has {name}, which {part} of the base does not have; it fits another model")
        placed |= {(part, name): value for name, value in own.items()}
    return placed


def write_merged(base: WholePipeline, changes: dict, target: Path) -> None:
    """Write a pipeline's folder with changed weights: dtypes, layout and division into files are the base's.

    Args:
        changes: {part: {tensor: Change}}.
        target: an empty folder. Files that do not change are hard links where the disk allows.
    """
    for part in base.folders:
        is_torch, changed = base.is_torch(part), changes.get(part, {})
        base.export(part, base.part_class(part), target / part, "diffusers" if is_torch else "ppdiffusers")
        for file in find_weights(target / part).files if changed else ():
            tensors, metadata = open_tensors(file)
            new = {name: merged(name, tensors[name], changed[name], is_torch) for name in tensors if name in changed}
            if new:
                write_tensors(file, {**tensors, **new}, metadata)
    shutil.copyfile(base.path / "model_index.json", target / "model_index.json")


def merged(name: str, tensor, change: Change, is_torch: bool):
    """A changed tensor in the layout of the base, computed when it is written."""
    found = in_torch_layout(name, tensor, is_torch)
    changed = Computed(found.dtype, found.shape, lambda: change.applied_to(name, as_array(found)))
    return in_torch_layout(name, changed, is_torch)  # to transpose again is the way back


class Difference:
    """The difference of two pipelines, `tuned` minus `base`, as LoRA layers of at most a rank.

    Args:
        targets: ends of the layers' names, or None for all linear layers and convolutions.
    Raises:
        UserError: the two have other tensors, or the same weights.
    """

    def __init__(self, base: WholePipeline, tuned: WholePipeline, rank: int, targets=None):
        self.base, self.tuned, self.rank, self.targets = base, tuned, rank, targets
        self.updates, self.left_out, self.lost = {}, [], {}
        parts = [part for part in base.folders if base.tensors(part)]
        for part in parts:
            if part in tuned.folders:
                self._compare(part)
            elif part in PARTS:
                raise tuned._error(f"has no part {part!r}, which the base has")
            else:
                self.left_out.append(f"{part}, which is missing in --tuned")
        if not self.updates and self.left_out and targets:
            found = f"none of the layers that differ ends with {','.join(targets)}; such as {self.left_out[0]}"
            raise UserError(f"--lora_target_modules: {found} differs")
        if not self.updates:
            raise tuned._error("has the same weights as the base in all layers that a LoRA can change")

    def _compare(self, part: str) -> None:
        one, other = self.base.tensors(part), self.tuned.tensors(part)
        for name in sorted({*one, *other}):
            if name.endswith("position_ids"):  # torch's buffers
                continue
            if name not in one or name not in other:
                found = "lacks {}, which the base has" if name in one else "has {}, which the base lacks"
                raise self.tuned._error(f"is of another model: its {part} {found.format(name)}")
            if list(one[name].shape) != list(other[name].shape):
                raise self.tuned._error(f"is of another model: {part} has another shape of {name} than the base's")
            for pipeline, tensor in ((self.base, one[name]), (self.tuned, other[name])):
                if first_not_finite({name: tensor}):
                    raise pipeline._error(f"has NaN or inf in {part}.{name}; expected finite weights")
            if np.array_equal(as_array(one[name]), as_array(other[name])):
                continue
            if part in PARTS and self._is_held(name, one[name]):
                self._add(f"{PARTS[part]}.{name.removesuffix('.weight')}", one[name], other[name])
            else:
                self.left_out.append(f"{part}.{name}")

    def _is_held(self, name: str, tensor) -> bool:
        layer = name.removesuffix(".weight")
        wanted = self.targets is None or any(layer == t or layer.endswith(f".{t}") for t in self.targets)
        return wanted and name.endswith(".weight") and (is_matrix(name, tensor) or len(tensor.shape) == 4)

    def _add(self, layer: str, one, other) -> None:
        out, kernel = one.shape[0], list(one.shape[1:])
        rank = min(self.rank, out, math.prod(kernel))
        shapes = [rank, *kernel], [out, rank, *[1] * (len(kernel) - 1)]

        def compute():
            change = as_array(other).astype(np.float64) - as_array(one).astype(np.float64)
            down, up, error = low_rank(change.reshape(out, -1), rank)
            self.lost[layer] = error / np.linalg.norm(change)
            return tuple(part.astype(np.float32).reshape(shape) for part, shape in zip((down, up), shapes))

        if layer in self.updates:
            raise self.tuned._error("differs in two parts that a file of LoRA layers calls the same")
        self.updates[layer] = computed_later(*shapes, np.dtype(np.float32), compute)
