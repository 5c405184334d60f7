"""UNet and VAE in the layout of CompVis' latent diffusion (Rombach et al. 2022), which Stable Diffusion and SDXL have.

Each function makes a table of rules for the names of one model, from either side: how many blocks it has is counted in
its names.
"""

from ppdiffusers_train.models.single_file.rules import CONVOLUTION, Rule, count

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.1": "mid_block.attentions.0",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def unet_rules(names, is_original: bool) -> list:
    """The rules of a UNet.

    Args:
        names: of its tensors.
        is_original: whether they are those of a single file.
    """
    layers = layers_of_file(names) if is_original else layers_of_folder(names)
    rules = [*pairs(UNET), *resnet("middle_block.0", "mid_block.resnets.0")]
    rules += resnet("middle_block.2", "mid_block.resnets.1")
    number = 1
    for level, size in enumerate(layers):
        for layer in range(size):
            rules += block(f"input_blocks.{number}", f"down_blocks.{level}", layer)
            number += 1
        if level < len(layers) - 1:
            rules.append(Rule(f"input_blocks.{number}.0.op", (f"down_blocks.{level}.downsamplers.0.conv",)))
            number += 1
    number = 0
    for level, size in enumerate(reversed(layers)):
        for layer in range(size + 1):
            rules += block(f"output_blocks.{number}", f"up_blocks.{level}", layer)
            number += 1
        last = f"output_blocks.{number - 1}"
        attends = any(name.startswith((f"{last}.1.norm.", f"up_blocks.{level}.attentions.")) for name in names)
        rules.append(Rule(f"{last}.{1 + attends}.conv", (f"up_blocks.{level}.upsamplers.0.conv",)))
    return rules


def layers_of_file(names) -> list:
    """The number of layers at each resolution, from the names of a single file."""
    layers = [0]
    for number in range(1, count(names, "input_blocks.")):
        if f"input_blocks.{number}.0.op.weight" in names:
            layers.append(0)
        else:
            layers[-1] += 1
    return layers


def layers_of_folder(names) -> list:
    """The number of layers at each resolution, from the names of a folder."""
    return [count(names, f"down_blocks.{level}.resnets.") for level in range(count(names, "down_blocks."))]


def block(original: str, name: str, layer: int) -> list:
    """The rules of one layer of a UNet: a residual block and, where there is one, the attention after it."""
    return [*resnet(f"{original}.0", f"{name}.resnets.{layer}"), Rule(f"{original}.1", (f"{name}.attentions.{layer}",))]


def resnet(original: str, name: str) -> list:
    """The rules of a residual block."""
    return [Rule(f"{original}.{inside}", (f"{name}.{other}",)) for inside, other in RESNET.items()]


def pairs(table: dict) -> list:
    """The rules of a table {name in the single file: name in the folder}."""
    return [Rule(original, (name,)) for original, name in table.items()]


def vae_rules(names, is_original: bool) -> list:
    """The rules of a VAE; arguments as for `unet_rules`."""
    levels = max(count(names, "decoder.up." if is_original else "decoder.up_blocks."), 1)
    rules = pairs({name: name for name in ("quant_conv", "post_quant_conv")})
    for side, ours, sample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        rules += pairs({f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")})
        rules += vae_middle(f"{side}.mid", f"{side}.mid_block") + pairs({f"{side}.norm_out": f"{side}.conv_norm_out"})
        for level in range(levels):
            original = f"{side}.{ours}.{level if side == 'encoder' else levels - 1 - level}"
            name = f"{side}.{ours}_blocks.{level}"
            rules.append(Rule(f"{original}.{sample}.conv", (f"{name}.{sample}rs.0.conv",)))
            start = f"{original}.block." if is_original else f"{name}.resnets."
            for layer in range(count(names, start)):
                rules += vae_resnet(f"{original}.block.{layer}", f"{name}.resnets.{layer}")
    return rules


def vae_middle(original: str, name: str) -> list:
    """The rules of a VAE's middle block, whose attention the single file writes as 1x1 convolutions."""
    rules = [Rule(f"{original}.attn_1.norm", (f"{name}.attentions.0.group_norm",))]
    for inside, other in VAE_ATTENTION.items():
        start = f"{original}.attn_1.{inside}", f"{name}.attentions.0.{other}"
        rules.append(Rule(f"{start[0]}.weight", (f"{start[1]}.weight",), CONVOLUTION))
        rules.append(Rule(f"{start[0]}.bias", (f"{start[1]}.bias",)))
    for layer in range(2):
        rules += vae_resnet(f"{original}.block_{layer + 1}", f"{name}.resnets.{layer}")
    return rules


def vae_resnet(original: str, name: str) -> list:
    """The rules of a VAE's residual block."""
    return [Rule(original, (name,)), Rule(f"{original}.nin_shortcut", (f"{name}.conv_shortcut",))]
