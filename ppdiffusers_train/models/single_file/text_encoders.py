"""Text encoders in a single file: transformers' own names, or those of OpenCLIP (SD 2.x, SDXL's second)."""

from ppdiffusers_train.models.single_file.rules import TRANSPOSED, Rule, count

OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def transformers_rules(names, is_original: bool) -> list:
    """The rules of an encoder whose names are the same on both sides."""
    return [Rule(start, (start,)) for start in sorted({name.split(".")[0] for name in names})]


def clip_rules(names, is_original: bool) -> list:
    """The rules of CLIP in SD 1.x; files with the names of older releases of transformers are read, too."""
    older = [Rule(start, (f"text_model.{start}",)) for start in ("embeddings", "encoder", "final_layer_norm")]
    return [Rule("text_model", ("text_model",)), *(older if is_original else [])]


def openclip_rules(names, is_original: bool) -> list:
    """The rules of an encoder of OpenCLIP, which has one matrix for queries, keys and values."""
    rules = [
        Rule("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        Rule("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        Rule("ln_final", ("text_model.final_layer_norm",)),
        Rule("text_projection", ("text_projection.weight",), TRANSPOSED),
    ]
    for layer in range(count(names, "transformer.resblocks." if is_original else "text_model.encoder.layers.")):
        original, name = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        rules += [Rule(f"{original}.{inside}", (f"{name}.{other}",)) for inside, other in OPENCLIP_LAYER.items()]
        for kind in ("weight", "bias"):
            projections = tuple(f"{name}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            rules.append(Rule(f"{original}.attn.in_proj_{kind}", projections))
    return rules
