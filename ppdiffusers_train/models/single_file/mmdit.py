"""The transformer of Stable Diffusion 3 in the layout of its authors (Esser et al. 2024)."""

from ppdiffusers_train.models.single_file.rules import HALVES_SWAPPED, Rule, count

TRANSFORMER = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
BLOCK = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
PROJECTIONS = {"x_block": ("to_q", "to_k", "to_v"), "context_block": ("add_q_proj", "add_k_proj", "add_v_proj")}


def transformer_rules(names, is_original: bool) -> list:
    """The rules of the transformer; arguments as for `unet_rules`."""
    rules = [Rule(original, (name,)) for original, name in TRANSFORMER.items()]
    rules += modulation("final_layer", "norm_out", HALVES_SWAPPED)
    blocks = count(names, "joint_blocks." if is_original else "transformer_blocks.")
    for number in range(blocks):
        original, name = f"joint_blocks.{number}", f"transformer_blocks.{number}"
        rules += [Rule(f"{original}.{inside}", (f"{name}.{other}",)) for inside, other in BLOCK.items()]
        # The last block does not go on with the text: of its modulation only scale and shift are left.
        change = HALVES_SWAPPED if number == blocks - 1 else ""
        rules += modulation(f"{original}.context_block", f"{name}.norm1_context", change)
        for side, projections in PROJECTIONS.items():
            for kind in ("weight", "bias"):
                stack = tuple(f"{name}.attn.{projection}.{kind}" for projection in projections)
                rules.append(Rule(f"{original}.{side}.attn.qkv.{kind}", stack))
    return rules


def modulation(original: str, name: str, change: str) -> list:
    """The rules of the layer that modulates a norm. The authors have the shift first, diffusers has the scale first."""
    start = f"{original}.adaLN_modulation.1"
    return [Rule(f"{start}.{kind}", (f"{name}.linear.{kind}",), change) for kind in ("weight", "bias")]
