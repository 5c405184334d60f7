"""What layers and their matrices are called in files of LoRA layers: the one table for all that reads or writes them.

Here, a layer is called `unet.down_blocks.0.….to_q`: the model's name in files, then the layer's in diffusers. Files
call the prior of Kandinsky 2.2 `unet`, too.
"""

import re

from ppdiffusers_train.errors import UserError

# What the matrices are called in a UNet, and in a transformer; text encoders have a third pair of names.
NAMES = {"unet": ("lora.down", "lora.up"), "transformer": ("lora_A", "lora_B")}
TEXT_ENCODER_NAMES = ("lora_linear_layer.down", "lora_linear_layer.up")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
KOHYA_PREFIXES = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
PEFT_PREFIX = "base_model.model."
COMFYUI_PREFIX = "diffusion_model."  # of transformers that have the names of diffusers
# The end of a key, in all naming schemes that are read. `_lora.down` belongs to the older names of diffusers,
# `….attn1.processor.to_q_lora.down.weight`; the PEFT library may add the name of its adapter.
_MATRIX = re.compile(
    r"(?:(?P<old>_lora)|\.lora|\.lora_linear_layer)\.(?P<part>down|up)\.weight"
    r"|\.lora_(?P<named>down|up|A|B)(?:\.default(?:_\d+)?)?\.weight"
    r"|\.(?P<alpha>alpha)"
)
PARTS = {"A": "down", "B": "up"}
OLD_LAYERS = {"to_out": "to_out.0"}
OLD_TEXT_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# The words of layer names in UNets, CLIP and Qwen-Image's transformer: kohya's names join them by underscores, which
# some of them contain.
WORDS = """down_blocks up_blocks mid_block attentions resnets transformer_blocks downsamplers upsamplers attn1 attn2
to_q to_k to_v to_out add_k_proj add_v_proj ff net proj proj_in proj_out time_emb_proj conv conv1 conv2 conv_shortcut
conv_in conv_out time_embedding add_embedding linear_1 linear_2 cond_proj text_model encoder layers self_attn q_proj
k_proj v_proj out_proj mlp fc1 fc2 text_projection
attn add_q_proj to_add_out img_mlp txt_mlp img_mod txt_mod""".split()
_WORD = re.compile(rf"(\d+|{'|'.join(sorted(WORDS, key=len, reverse=True))})(?:_|$)")
# The names of the original code of Stable Diffusion, as kohya's scripts write them for SDXL.
LAYERS_PER_BLOCK = 2  # of every published UNet of the family
ORIGINAL_TOP = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
ORIGINAL_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
ORIGINAL_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_ORIGINAL = re.compile(r"(?:(input|output)_blocks_(\d+)|(middle)_block)_(\d)_(\w+)")


def split_key(key: str):
    """(the layer's name in the file, "down", "up" or "alpha") of a tensor's name; None if it is no part of a LoRA."""
    match = next((match for match in _MATRIX.finditer(key) if match.end() == len(key)), None)
    if match is None:
        return None
    layer, part = key[: match.start()], match["part"] or match["named"] or match["alpha"]
    if match["old"]:
        head, _, last = layer.replace(".processor.", ".").rpartition(".")
        layer = f"{head}.{(OLD_TEXT_LAYERS if head.endswith('self_attn') else OLD_LAYERS).get(last, last)}"
    return layer.removesuffix(".lora"), PARTS.get(part, part)


def with_component(layer: str) -> str:
    """A layer's dotted name in a file -> its name here: the model is added where the file leaves it out."""
    layer = layer.removeprefix(PEFT_PREFIX)
    if layer.startswith(COMFYUI_PREFIX):
        return f"transformer.{layer.removeprefix(COMFYUI_PREFIX)}"
    component, _, name = layer.partition(".")
    if component in NAMES or component in TEXT_ENCODERS:
        return layer
    if component == "prior":
        return f"unet.{name}"
    if component == "text_model":
        return f"text_encoder.{layer}"
    # Only the blocks of SD3 and of Qwen-Image have an attention without a number.
    is_transformer = re.match(r"transformer_blocks\.\d+\.(attn\.|ff_context|norm1_context|(img|txt)_m)", layer)
    return f"{'transformer' if is_transformer else 'unet'}.{layer}"


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


def from_kohya_name(file, name: str, layers_per_block: int = LAYERS_PER_BLOCK) -> str:
    """The reverse of `kohya_name`, which also reads the names of the original code, `lora_unet_input_blocks_…`.

    Args:
        layers_per_block: of the UNet, which the original code's numbers depend on.
    """
    prefix = next((prefix for prefix in sorted(KOHYA_PREFIXES, reverse=True) if name.startswith(f"{prefix}_")), None)
    if prefix is None:
        raise UserError(f"{file}: {name} begins with none of {', '.join(KOHYA_PREFIXES)}")
    rest = name[len(prefix) + 1 :]
    layer = dotted(rest) or (from_original_name(rest, layers_per_block) if prefix == "lora_unet" else None)
    if layer is None:
        raise UserError(f"{file}: {name} is not a layer of a UNet or text encoder that is known here")
    return with_component(layer) if prefix == "lora_unet" else f"{KOHYA_PREFIXES[prefix]}.{layer}"


def dotted(name: str):
    """`attn1_to_out_0` -> `attn1.to_out.0`; None for words that are not in `WORDS`."""
    words = []
    while name:
        match = _WORD.match(name)
        if match is None:
            return None
        words.append(match.group(1))
        name = name[match.end() :]
    return ".".join(words)


def from_original_name(name: str, layers_per_block: int):
    """`input_blocks_4_1_proj_in` -> `down_blocks.1.attentions.0.proj_in`; None for a name that is not known.

    The original code counts the layers of all blocks, down- and upsamplers included, in one sequence.
    """
    if name in ORIGINAL_TOP:
        return ORIGINAL_TOP[name]
    match = _ORIGINAL.fullmatch(name)
    if match is None:
        return None
    side, number, middle, part, rest = match.groups()
    if middle:
        place, is_resnet = ORIGINAL_MIDDLE.get(part), part != "1"
    else:
        way, first = ("down", 1) if side == "input" else ("up", 0)
        block, layer = divmod(int(number) - first, layers_per_block + 1)
        if rest == {"down": "op", "up": "conv"}[way]:
            return f"{way}_blocks.{block}.{way}samplers.0.conv"
        is_resnet = part == "0"
        place = f"{way}_blocks.{block}.{'resnets' if is_resnet else 'attentions'}.{layer}"
    inside = ORIGINAL_RESNET.get(rest) if is_resnet else dotted(rest)
    return f"{place}.{inside}" if place and inside else None
