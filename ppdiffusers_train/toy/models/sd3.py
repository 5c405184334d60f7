"""A tiny Stable Diffusion 3, built offline in seconds, with all classes and code paths of the published one."""

from pathlib import Path

import paddle
from ppdiffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from ppdiffusers.transformers import CLIPTextModelWithProjection

from ppdiffusers_train.models.attention import provide_joint_attention
from ppdiffusers_train.toy.models.clip import text_config
from ppdiffusers_train.toy.models.t5 import build_t5, build_t5_tokenizer
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer

EMBEDDING = 32  # of each of CLIP's text encoders
LARGEST_SIDE = 32  # of an image, in tokens
SHIFT_FACTOR = 0.0609  # the published VAE's


def build_sd3(directory, layers=2, seed=0) -> Path:
    """Write an SD3 pipeline, as the hub has it, and return its folder.

    Args:
        layers: of the transformer.
        seed: of the random weights.
    """
    directory = Path(directory)
    provide_joint_attention()
    paddle.seed(seed)
    tokenizers = [build_tokenizer(directory / name) for name in ("tokenizer", "tokenizer_2")]
    tokenizer_3 = build_t5_tokenizer(directory / "tokenizer_3")
    first, second = (
        CLIPTextModelWithProjection(text_config(tokenizers[0], EMBEDDING, 2, 2, hidden_act=activation))
        for activation in ("quick_gelu", "gelu")
    )
    transformer = build_transformer(layers)
    StableDiffusion3Pipeline(
        vae=build_vae(),
        text_encoder=first,
        tokenizer=tokenizers[0],
        text_encoder_2=second,
        tokenizer_2=tokenizers[1],
        text_encoder_3=build_t5(len(tokenizer_3), transformer.config.joint_attention_dim, layers=2, seed=seed),
        tokenizer_3=tokenizer_3,
        transformer=transformer,
        scheduler=build_scheduler(),
    ).save_pretrained(str(directory))
    return directory


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The published model's scheduler."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def build_vae() -> AutoencoderKL:
    """A VAE that halves the resolution twice, with the published one's shift, scale and lack of quant convolutions."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer(layers=2, heads=2, sample_size=16, channels=16, embedding=EMBEDDING) -> SD3Transformer2DModel:
    """A transformer of 16 channels per head, whose tokens are 2x2 latents of `channels` channels each.

    Args:
        sample_size: of the latents; their position embeddings are the middle of a larger table.
        embedding: width of each of CLIP's text encoders; T5 is as wide as both together.
    """
    return SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=2 * embedding,
        caption_projection_dim=16 * heads,
        pooled_projection_dim=2 * embedding,
        pos_embed_max_size=LARGEST_SIDE,
    )
