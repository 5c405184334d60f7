"""Files of LoRA layers, as ppdiffusers, diffusers and the kohya family (ComfyUI, WebUIs) write them.

In memory, a LoRA is `{"unet.down_blocks.0.….to_q": Update}`, whatever the file's names and layout. Two of the three
have no place for α: there, B is written times α / r, and α is kept in the metadata, to be recovered.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.tensor_files import read_tensors, write_tensors

# What the matrices are called in a UNet, and in a transformer; text encoders have a third pair of names.
NAMES = {"unet": ("lora.down", "lora.up"), "transformer": ("lora_A", "lora_B")}
KOHYA_PREFIXES = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
# The words of layer names in UNets and CLIP: kohya's names join them by underscores, which some of them contain.
WORDS = """down_blocks up_blocks mid_block attentions resnets transformer_blocks downsamplers upsamplers attn1 attn2
to_q to_k to_v to_out add_k_proj add_v_proj ff net proj proj_in proj_out time_emb_proj conv conv1 conv2 conv_shortcut
conv_in conv_out time_embedding add_embedding linear_1 linear_2 cond_proj text_model encoder layers self_attn q_proj
k_proj v_proj out_proj mlp fc1 fc2 text_projection""".split()
_WORD = re.compile(rf"(\d+|{'|'.join(sorted(WORDS, key=len, reverse=True))})(?:_|$)")
# (end of a key, which matrix it is), in all naming schemes that are read.
ENDINGS = {
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}


@dataclass
class Update:
    """One layer's update, (α / r) · B A, in torch's layout."""

    down: np.ndarray  # A [r, in] or [r, in, kh, kw]
    up: np.ndarray  # B [out, r] or [out, r, 1, 1]
    alpha: float = None  # α; None: r

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """α / r."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def write_lora(file, updates: dict, file_format: str) -> None:
    """Write `{layer: Update}` for "ppdiffusers", "diffusers" or "kohya", each matrix in its own dtype.

    Except bfloat16 for ppdiffusers, whose reader (0.29.0) fails on it: float32 is written, which loses nothing.

    Raises:
        UserError: no program reads the kohya layout of this model.
    """
    arrays, metadata = {}, {"format": "pd" if file_format == "ppdiffusers" else "pt"}
    if file_format == "kohya":
        for layer, update in updates.items():
            name = kohya_name(layer, has_second_encoder=any(name.startswith("text_encoder_2.") for name in updates))
            arrays[f"{name}.lora_down.weight"], arrays[f"{name}.lora_up.weight"] = update.down, update.up
            arrays[f"{name}.alpha"] = np.float32(update.rank * update.scale)
    else:
        for layer, update in updates.items():
            down, up = NAMES.get(layer.split(".")[0], ("lora_linear_layer.down", "lora_linear_layer.up"))
            for part, array in ((down, update.down), (up, scaled(update.up, update.scale))):
                if file_format == "ppdiffusers":
                    array = array.T if array.ndim == 2 else array
                    array = array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array
                arrays[f"{layer}.{part}.weight"] = array
        alphas = {update.alpha for update in updates.values()}
        if len(alphas) == 1 and alphas != {None}:
            metadata["lora_alpha"] = repr(alphas.pop())
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, arrays, metadata)


def read_lora(file) -> dict:
    """`{layer: Update}` of a file in any of the three formats.

    Raises:
        UserError: it cannot be read, or holds anything but LoRA layers.
    """
    arrays, metadata = read_tensors(file)
    layers, is_kohya = {}, any(".lora_down." in key for key in arrays)
    for key, array in arrays.items():
        ending = next((ending for ending in ENDINGS if key.endswith(ending)), None)
        if ending is None:
            raise UserError(f"{file}: {key} is no part of a LoRA; expected names such as …to_q.lora.down.weight")
        layers.setdefault(key.removesuffix(ending), {})[ENDINGS[ending]] = array
    recorded = float(metadata["lora_alpha"]) if "lora_alpha" in metadata else None
    updates = {}
    for layer, found in layers.items():
        if not {"down", "up"} <= set(found):
            raise UserError(f"{file}: {layer} has no {'up' if 'down' in found else 'down'} matrix")
        down, up = torch_layout(file, layer, found["down"], found["up"], metadata.get("format"))
        if is_kohya:
            updates[from_kohya_name(file, layer)] = Update(
                down, up, float(found["alpha"]) if "alpha" in found else None
            )
            continue
        name = layer if layer.startswith(("unet.", "transformer.", "text_encoder")) else f"unet.{layer}"
        alpha = float(found["alpha"]) if "alpha" in found else None
        if recorded:  # the file's B is already scaled
            alpha, up = recorded, scaled(up, down.shape[0] / recorded)
        updates[name] = Update(down, up, alpha)
    return updates


def scaled(array: np.ndarray, factor: float) -> np.ndarray:
    """`array` times `factor`, computed in float32, in its own dtype."""
    return array if factor == 1 else (array.astype(np.float32) * np.float32(factor)).astype(array.dtype)


def torch_layout(file, layer: str, down, up, library):
    """Both matrices in torch's layout. Which layout they have follows from their shapes, or else from the metadata."""
    if down.ndim != 2:
        return down, up
    is_torch, is_paddle = down.shape[0] == up.shape[1], down.shape[1] == up.shape[0]
    if not (is_torch or is_paddle):
        raise UserError(f"{file}: {layer} has matrices of {down.shape} and {up.shape}, which have no rank in common")
    if is_torch and is_paddle:
        is_torch = library != "pd"
    return (down, up) if is_torch else (down.T, up.T)


def kohya_name(layer: str, has_second_encoder: bool) -> str:
    """`unet.down_blocks.0.….to_q` -> `lora_unet_down_blocks_0_…_to_q`.

    Raises:
        UserError: the layer is of a model that no program reads in this layout.
    """
    component, _, name = layer.partition(".")
    if component in NAMES and not re.match(r"(down_blocks|mid_block|up_blocks|conv_|time_emb|add_emb)", name):
        raise UserError(f"the kohya layout is for UNets and their text encoders; this file has the layer {name}")
    if component == "unet" and re.search(r"attentions\.\d+\.(to_|add_)", name):
        raise UserError(f"no program reads the kohya layout of Kandinsky's UNet; this file has the layer {name}")
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if has_second_encoder else "lora_te"}.get(component)
    return f"{prefix or 'lora_te2'}_{name.replace('.', '_')}"


def from_kohya_name(file, name: str) -> str:
    """The reverse of `kohya_name`."""
    prefix = next((prefix for prefix in sorted(KOHYA_PREFIXES, reverse=True) if name.startswith(f"{prefix}_")), None)
    if prefix is None:
        raise UserError(f"{file}: {name} begins with none of {', '.join(KOHYA_PREFIXES)}")
    rest, words = name[len(prefix) + 1 :], []
    while rest:
        match = _WORD.match(rest)
        if match is None:
            raise UserError(
                f"{file}: {name} is not a layer of a UNet as diffusers names them (names of the original SD code, such "
                "as input_blocks, are not read)"
            )
        words.append(match.group(1))
        rest = rest[match.end() :]
    return ".".join([KOHYA_PREFIXES[prefix], *words])
