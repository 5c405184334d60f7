"""A tiny Stable Diffusion XL, built offline in seconds, with all classes and code paths of the published one."""

from pathlib import Path

import paddle
from ppdiffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from ppdiffusers.transformers import CLIPTextModel, CLIPTextModelWithProjection

from ppdiffusers_train.toy.models.clip import text_config
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer

EMBEDDING, TIME_ID_CHANNELS = 32, 8


def build_sdxl(directory, channels=(16, 32)) -> Path:
    """Write an SDXL pipeline, as the hub has it, and return its folder.

    Args:
        channels: width of the UNet at each resolution, multiples of 16.
    """
    directory = Path(directory)
    paddle.seed(0)
    tokenizers = [build_tokenizer(directory / name) for name in ("tokenizer", "tokenizer_2")]
    StableDiffusionXLPipeline(
        vae=build_vae(),
        text_encoder=CLIPTextModel(text_config(tokenizers[0], EMBEDDING, layers=3, heads=2)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizers[1], EMBEDDING, 3, 2, hidden_act="gelu")),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=build_unet(channels),
        scheduler=build_scheduler(),
        add_watermarker=False,
    ).save_pretrained(str(directory))
    return directory


def build_scheduler() -> DDPMScheduler:
    """The published model's noise schedule."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def build_vae() -> AutoencoderKL:
    """A VAE that halves the resolution twice."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.13025,
    )


def build_unet(channels=(16, 32), sample_size=16, embedding=EMBEDDING, layers=2, attends=()) -> UNet2DConditionModel:
    """A UNet conditioned on both text encoders' tokens, the pooled text embedding and the six time ids.

    Args:
        layers: of each transformer, at all but the highest resolution.
        attends: whether each resolution has attention; by default all but the highest.
    """
    lower = len(channels) - 1
    attends = attends or (False,) + (True,) * lower
    return UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        block_out_channels=channels,
        layers_per_block=1,
        transformer_layers_per_block=[1] + [layers] * lower,
        attention_head_dim=[2] + [4] * lower,
        cross_attention_dim=2 * embedding,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_CHANNELS,
        projection_class_embeddings_input_dim=embedding + 6 * TIME_ID_CHANNELS,
    )
