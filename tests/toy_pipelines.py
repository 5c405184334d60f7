"""Pipelines of toy models for tests.

Stable Diffusion 1.5 and 3 are built offline in seconds, with all classes and code paths of the published ones.
"""

from pathlib import Path

import paddle
from ppdiffusers import AutoencoderKL, StableDiffusion3Pipeline
from ppdiffusers.transformers import CLIPTextModel, CLIPTextModelWithProjection

from ppdiffusers_train.models.attention import provide_joint_attention
from ppdiffusers_train.toy.demo.jobs import SAMPLING
from ppdiffusers_train.toy.models import sd, sd3, sdxl
from ppdiffusers_train.toy.models.clip import text_config
from ppdiffusers_train.toy.models.t5 import build_t5, build_t5_tokenizer
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
    scheduler = sdxl.build_scheduler()
    scheduler.register_to_config(prediction_type=prediction_type)
    text_encoder = CLIPTextModel(text_config(tokenizer, sdxl.EMBEDDING, layers=2, heads=2))
    unet = sd.build_unet(channels)
    sd.assemble_pipeline(sdxl.build_vae(), text_encoder, tokenizer, unet, scheduler).save_pretrained(str(directory))
    return directory


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
        CLIPTextModelWithProjection(text_config(tokenizers[0], sd3.EMBEDDING, 2, 2, hidden_act=activation))
        for activation in ("quick_gelu", "gelu")
    )
    transformer = sd3.build_transformer(layers)
    StableDiffusion3Pipeline(
        vae=build_sd3_vae(),
        text_encoder=first,
        tokenizer=tokenizers[0],
        text_encoder_2=second,
        tokenizer_2=tokenizers[1],
        text_encoder_3=build_t5(len(tokenizer_3), transformer.config.joint_attention_dim, layers=2, seed=seed),
        tokenizer_3=tokenizer_3,
        transformer=transformer,
        scheduler=sd3.build_scheduler(),
    ).save_pretrained(str(directory))
    return directory


def build_sd3_vae() -> AutoencoderKL:
    """A VAE that halves the resolution twice, with the published one's shift, scale and lack of quant convolutions."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=sd3.SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def pretrained_sampling(job) -> dict:
    """Arguments for a call of the pipeline that a job starts from, with as many steps as that needs."""
    return {**SAMPLING, "num_inference_steps": 50} if job.distils else job.sampling
