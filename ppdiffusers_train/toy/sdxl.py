"""A tiny Stable Diffusion XL, built offline in seconds: every class and every path of the real one, random weights."""

from pathlib import Path

import paddle
from ppdiffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from ppdiffusers.transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ppdiffusers_train.toy.tokenizer import build_tokenizer

EMBEDDING, TIME_ID_CHANNELS = 32, 8


def build_sdxl(directory, channels=(16, 32), seed=0) -> Path:
    """Write an SDXL pipeline, as the hub has it, and return its folder.

    Args:
        channels: width of the UNet at each resolution, multiples of 16.
        seed: of the random weights.
    """
    directory = Path(directory)
    paddle.seed(seed)
    StableDiffusionXLPipeline(
        vae=build_vae(),
        text_encoder=CLIPTextModel(text_config(hidden_act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(hidden_act="gelu")),
        tokenizer=build_tokenizer(directory / "tokenizer"),
        tokenizer_2=build_tokenizer(directory / "tokenizer_2"),
        unet=build_unet(channels),
        scheduler=build_scheduler(),
        add_watermarker=False,
    ).save_pretrained(str(directory))
    return directory


def build_scheduler() -> DDPMScheduler:
    """The published model's noise schedule."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="leading"
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


def text_config(**options) -> CLIPTextConfig:
    """A text encoder's configuration; the tokenizer has 514 tokens."""
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=EMBEDDING,
        intermediate_size=2 * EMBEDDING,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=EMBEDDING,
        eos_token_id=512,
        bos_token_id=513,
        **options,
    )


def build_unet(channels=(16, 32)) -> UNet2DConditionModel:
    """A UNet that takes both encoders' tokens, the pooled text and the six time ids."""
    lower = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower,
        up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",),
        block_out_channels=channels,
        layers_per_block=1,
        transformer_layers_per_block=[1] + [2] * lower,
        attention_head_dim=[2] + [4] * lower,
        cross_attention_dim=2 * EMBEDDING,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_CHANNELS,
        projection_class_embeddings_input_dim=EMBEDDING + 6 * TIME_ID_CHANNELS,
    )
