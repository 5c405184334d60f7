"""A tiny Stable Diffusion 1.5, built offline in seconds, with all classes and code paths of the published one."""

from pathlib import Path

import paddle
from ppdiffusers import StableDiffusionPipeline, UNet2DConditionModel
from ppdiffusers.transformers import CLIPTextModel

from ppdiffusers_train.toy.models.clip import text_config
from ppdiffusers_train.toy.models.sdxl import EMBEDDING, build_scheduler, build_vae
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer


def build_sd(directory, channels=(16, 32), seed=0, prediction_type="epsilon") -> Path:
    """Write a Stable Diffusion pipeline, as the hub has it, and return its folder.

    Args:
        channels: width of the UNet at each resolution, multiples of 16.
        seed: of the random weights.
        prediction_type: of the UNet.
    """
    directory = Path(directory)
    paddle.seed(seed)
    tokenizer = build_tokenizer(directory / "tokenizer")
    scheduler = build_scheduler()
    scheduler.register_to_config(prediction_type=prediction_type)
    text_encoder = CLIPTextModel(text_config(tokenizer, EMBEDDING, layers=2, heads=2))
    assemble_pipeline(build_vae(), text_encoder, tokenizer, build_unet(channels), scheduler).save_pretrained(
        str(directory)
    )
    return directory


def assemble_pipeline(vae, text_encoder, tokenizer, unet, scheduler) -> StableDiffusionPipeline:
    """A pipeline of these parts, without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_unet(channels=(16, 32), sample_size=16, embedding=EMBEDDING) -> UNet2DConditionModel:
    """A UNet with cross-attention at all but the lowest resolution, as the published one."""
    upper = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=("CrossAttnDownBlock2D",) * upper + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * upper,
        block_out_channels=channels,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=embedding,
        norm_num_groups=16,
    )
