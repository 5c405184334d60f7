"""Files of LoRA layers, as ppdiffusers, diffusers, PEFT and the kohya family (ComfyUI, WebUIs) write them.

In memory, a LoRA is `{"unet.down_blocks.0.….to_q": Update}`, whatever the file's names and layout. Files that we write
for ppdiffusers and diffusers have no place for α: there, B is written times α / r, and α is kept in the metadata.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.lora_layout import guessed_layout, in_torch_layout, stated_layout
from ppdiffusers_train.models.lora_libraries import FILES, OTHER_FILES, PEFT_CONFIG, PEFT_STEM
from ppdiffusers_train.models.lora_names import (
    LAYERS_PER_BLOCK,
    NAMES,
    PEFT_PREFIX,
    TEXT_ENCODER_NAMES,
    from_kohya_name,
    kohya_name,
    split_key,
    with_component,
)
from ppdiffusers_train.tensor_files import FLOATS, Computed, Converted, as_array, dtype_of, open_tensors, write_tensors

ADAPTER_METADATA = "lora_adapter_metadata"  # PEFT's configuration in files of diffusers from 0.35 on
OUR_ALPHA = "lora_alpha"  # in the metadata of our files, whose B is already scaled


@dataclass(frozen=True)
class Update:
    """One layer's update, (α / r) · B A, in torch's layout. Matrices are read when they are used.

    Args:
        stored_down: A [r, in] or [r, in, kh, kw]. stored_up: B / factor, [out, r] or [out, r, 1, 1].
        alpha: α; None: r.
    """

    stored_down: object
    stored_up: object
    alpha: float = None
    factor: float = 1.0

    @property
    def down(self) -> np.ndarray:
        """A."""
        return as_array(self.stored_down)

    @property
    def up(self) -> np.ndarray:
        """B."""
        return scaled(as_array(self.stored_up), self.factor)

    @property
    def shape(self) -> tuple:
        """(out, in · kh · kw)."""
        return self.stored_up.shape[0], math.prod(self.stored_down.shape[1:])

    @property
    def rank(self) -> int:
        return self.stored_down.shape[0]

    @property
    def scale(self) -> float:
        """α / r."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def times(self, factor: float) -> "Update":
        """The update multiplied by a number."""
        return replace(self, factor=self.factor * factor)


def find_lora(path, flag: str) -> Path:
    """The LoRA's file that a user names by itself or by its folder.

    Raises:
        UserError: there is none in the folder.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{flag}: {str(path)!r} does not exist; expected a LoRA's file or its folder")
    known = [*FILES.values(), *OTHER_FILES]
    found = [path / name for name in known if (path / name).is_file()]
    if not found:
        raise UserError(f"{flag}: {str(path)!r} has none of {', '.join(known)}; name the file itself")
    return found[0]


def write_lora(file, updates: dict, file_format: str) -> None:
    """Write `{layer: Update}` for "ppdiffusers", "diffusers" or "kohya", each matrix in its own dtype, one at a time.

    Except matrices that would lose precision, and bfloat16 for ppdiffusers, whose reader (0.29.0) fails on it: float32
    is written, which loses nothing.

    Raises:
        UserError: no program reads the kohya layout of this model, or a number is too large.
    """
    tensors, metadata = {}, {"format": "pd" if file_format == "ppdiffusers" else "pt"}
    if file_format == "kohya":
        has_second_encoder = any(name.startswith("text_encoder_2.") for name in updates)
        for layer, update in updates.items():
            name = kohya_name(layer, has_second_encoder)
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = matrices(layer, update)
            tensors[f"{name}.alpha"] = np.float32(update.rank * update.scale)
    else:
        rank = max((update.rank for update in updates.values()), default=0)
        for layer, update in updates.items():
            # diffusers scales all layers by one α / r, whatever their own ranks.
            update = padded(update, rank) if file_format == "diffusers" else update
            names = NAMES.get(layer.split(".")[0], TEXT_ENCODER_NAMES)
            for name, matrix in zip(names, matrices(layer, update.times(update.scale))):
                if file_format == "ppdiffusers":
                    widened = np.dtype(np.float32) if matrix.dtype == ml_dtypes.bfloat16 else matrix.dtype
                    matrix = Converted(matrix, widened, transposed=len(matrix.shape) == 2)
                tensors[f"{layer}.{name}.weight"] = matrix
        alphas = {update.alpha for update in updates.values()}
        if len(alphas) == 1 and alphas != {None}:
            metadata[OUR_ALPHA] = repr(alphas.pop())
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors, metadata)


def padded(update: Update, rank: int) -> Update:
    """An update with a larger rank that computes the same: new rows of A and new columns of B are zero."""
    if update.rank == rank:
        return update

    def matrix(stored, array, axis):
        shape = [rank if number == axis else size for number, size in enumerate(stored.shape)]
        widths = [(0, rank - update.rank if number == axis else 0) for number in range(len(shape))]
        return Computed(dtype_of(stored), shape, lambda: np.pad(array(), widths))

    down = matrix(update.stored_down, lambda: update.down, 0)
    up = matrix(update.stored_up, lambda: as_array(update.stored_up), 1)
    return replace(update, stored_down=down, stored_up=up, alpha=None if update.alpha is None else update.scale * rank)


def matrices(layer: str, update: Update) -> tuple:
    """(A, B), each computed when it is written. B has its stored dtype if that holds the factor's multiples exactly;
    float16 has too few small and large numbers for most α / r.

    Raises:
        UserError: B times the factor is too large even for float32.
    """
    up, dtype = update.up, dtype_of(update.stored_up)
    if not np.isfinite(up).all():
        raise UserError(f"{layer} would be NaN or inf as {up.dtype}; expected a smaller scale or alpha")
    with np.errstate(over="ignore", under="ignore"):
        is_exact = np.array_equal(up.astype(dtype).astype(up.dtype), up)
    dtype = dtype if is_exact else up.dtype
    return update.stored_down, Computed(dtype, up.shape, lambda: update.up.astype(dtype))


def read_lora(file, layers_per_block: int = LAYERS_PER_BLOCK) -> dict:
    """`{layer: Update}` of a file in any of the formats.

    Args:
        layers_per_block: see `lora_names.from_kohya_name`.
    Raises:
        UserError: it cannot be read, or holds anything but LoRA layers.
    """
    tensors, metadata = open_tensors(file)
    layers = {}
    for key, tensor in tensors.items():
        found = split_key(key)
        if found is None:
            raise UserError(f"{file}: {key} is no part of a LoRA; expected names such as …to_q.lora.down.weight")
        name, part = found
        is_kohya = "." not in name and name.startswith(("lora_", "lycoris_"))
        layer = from_kohya_name(file, name, layers_per_block) if is_kohya else with_component(name)
        if part in layers.setdefault(layer, {}):
            raise UserError(f"{file}: {layer} has two matrices of the same kind; {key} is one of them")
        layers[layer][part] = tensor
    if not layers:
        raise UserError(f"{file}: holds no LoRA layers")
    config = adapter_config(file, metadata, any(key.startswith(PEFT_PREFIX) for key in tensors))
    is_kohya = any(".lora_down." in key for key in tensors)
    recorded = None if is_kohya or config else our_alpha(file, metadata)
    layout = stated_layout(tensors, metadata)
    if layout is None:
        layout = guessed_layout(file, [(layer, *both(file, layer, found)) for layer, found in layers.items()])
    return {layer: read_layer(file, layer, found, layout, config, recorded) for layer, found in layers.items()}


def both(file, layer: str, found: dict) -> tuple:
    """A and B of a layer, as they are stored.

    Raises:
        UserError: one is missing.
    """
    if not {"down", "up"} <= set(found):
        raise UserError(f"{file}: {layer} has no {'up' if 'down' in found else 'down'} matrix")
    return found["down"], found["up"]


def read_layer(file, layer: str, found: dict, layout: str, config: dict, recorded) -> Update:
    """One layer of a file.

    Args:
        found: {"down", "up", "alpha": stored tensor}. layout: see `lora_layout`. config: PEFT's, or {}.
        recorded: α of our own files, or None.
    """
    down, up = in_torch_layout(file, layer, *both(file, layer, found), layout)
    rank = down.shape[0]
    for stored, name in ((found["down"], "down"), (found["up"], "up")):
        array = as_array(stored)
        if array.dtype not in FLOATS or not np.isfinite(array).all():
            wrong = "NaN or inf" if array.dtype in FLOATS else str(array.dtype)
            raise UserError(f"{file}: the {name} matrix of {layer} has {wrong}; expected finite floating-point numbers")
    if "alpha" in found:
        alpha = as_array(found["alpha"]).astype(np.float64).reshape(-1)
        if alpha.size != 1 or not np.isfinite(alpha[0]):
            raise UserError(f"{file}: the alpha of {layer} is {alpha.tolist()}; expected a number")
        return Update(down, up, float(alpha[0]))
    if config:
        return Update(down, up, configured_alpha(file, config, layer, rank))
    return Update(down, up, recorded, rank / recorded) if recorded else Update(down, up)


def our_alpha(file, metadata: dict):
    """The α that our own files keep in their metadata, or None."""
    if OUR_ALPHA not in metadata:
        return None
    try:
        alpha = float(metadata[OUR_ALPHA])
    except ValueError:
        alpha = 0.0
    if not 0 < alpha < math.inf:
        raise UserError(f"{file}: its metadata has {OUR_ALPHA} {metadata[OUR_ALPHA]!r}; expected a number above 0")
    return alpha


def adapter_config(file, metadata: dict, is_peft: bool) -> dict:
    """PEFT's configuration of a file, from its metadata or from the file beside it; {} if there is none.

    Raises:
        UserError: it cannot be read, or is not of a plain LoRA.
    """
    beside = Path(file).with_name(PEFT_CONFIG)
    is_peft = is_peft or Path(file).stem == PEFT_STEM
    try:
        if ADAPTER_METADATA in metadata:
            config = json.loads(metadata[ADAPTER_METADATA])
        else:
            config = json.loads(beside.read_text(encoding="utf-8")) if is_peft and beside.is_file() else {}
        flags = {key.split(".")[-1]: value for key, value in config.items()}
    except (ValueError, OSError, AttributeError) as error:
        raise UserError(f"{file}: the configuration of its adapter cannot be read: {error}") from error
    if flags.get("use_dora"):
        raise UserError(f"{file}: is a DoRA; expected a plain LoRA")
    return config


def configured_alpha(file, config: dict, layer: str, rank: int):
    """The α of a layer in PEFT's configuration, whose keys may begin with the model's name; None if it has none."""
    component, _, name = layer.partition(".")
    names = ("unet", "prior") if component == "unet" else (component,)
    own = next((f"{prefix}." for prefix in names if any(key.startswith(f"{prefix}.") for key in config)), "")
    alpha = config.get(f"{own}lora_alpha")
    try:
        for pattern, value in (config.get(f"{own}alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):  # as PEFT does
                alpha = value
                break
        alpha = None if alpha is None else float(alpha)
        if alpha is not None and not math.isfinite(alpha):
            raise ValueError(f"it is {alpha}; expected a number")
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: its configuration has no alpha for {layer} that can be read: {error}") from error
    return alpha * math.sqrt(rank) if alpha is not None and config.get(f"{own}use_rslora") else alpha


def scaled(array: np.ndarray, factor: float) -> np.ndarray:
    """`array` times `factor`, in float32 or more: a product may have no number in a smaller dtype."""
    if factor == 1:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        wide = np.promote_types(array.dtype, np.float32)
        return array.astype(wide) * wide.type(factor)
