"""The pipelines of the world of shapes: Kandinsky 2.2, Stable Diffusion, SDXL and SD3, trained on its pictures.

    write_kandinsky("kandinsky")  # kandinsky/prior and kandinsky/decoder, as the hub has them

They use all classes and code paths of the published models. `make toys` trains the shipped weights.
"""

from pathlib import Path

import paddle
from ppdiffusers import (
    KandinskyV22Pipeline,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from ppdiffusers.transformers import CLIPTextModel

from ppdiffusers_train.models.attention import provide_joint_attention
from ppdiffusers_train.toy.models import kandinsky2_2, movq, sd, sd3, sdxl, towers, vae
from ppdiffusers_train.toy.models.shipped import FOLDER, load_weights
from ppdiffusers_train.toy.models.t5 import build_t5, build_t5_tokenizer
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer
from ppdiffusers_train.toy.world.words import vocabulary

PRIOR, DECODER, SD, SDXL, SD3 = (FOLDER / f"{name}.safetensors" for name in ("prior", "decoder", "sd", "sdxl", "sd3"))

CHANNELS = (32, 64)  # of the UNets, at 8x8 and 4x4 latents
ATTENDS = (True, False)  # attention at 8x8 latents is affordable, and shapes are worse without it
PRIOR_LAYERS = 4
TRANSFORMER_LAYERS, TRANSFORMER_HEADS = 4, 6
LATENT_SIZE = 8
TOKENS = 24  # of a caption; the longest wording has 16

# All predict velocity: the content of an image is decided at high noise, where epsilon hardly depends on it.
PREDICTION_TYPE = "v_prediction"


def write_kandinsky(directory, trained=True) -> tuple:
    """Write a prior pipeline and a decoder pipeline.

    Args:
        directory: the parent of the folders `prior` and `decoder`.
        trained: whether the prior and the UNet have trained weights; the encoders always have.
    Returns:
        The two folders: (prior, decoder).
    """
    prior_folder, decoder_folder = Path(directory) / "prior", Path(directory) / "decoder"
    paddle.seed(0)
    prior = kandinsky2_2.build_prior(PRIOR_LAYERS, TOKENS)
    unet = kandinsky2_2.build_unet(CHANNELS, LATENT_SIZE, ATTENDS)
    mean, std = towers.load_embedding_statistics()
    prior.clip_mean.set_value(mean)
    prior.clip_std.set_value(std)
    if trained:
        load_weights(prior, PRIOR)
        load_weights(unet, DECODER)
    tokenizer = build_tokenizer(prior_folder / "tokenizer", vocabulary(), TOKENS)
    kandinsky2_2.assemble_prior_pipeline(
        tokenizer, towers.load_text_tower(tokenizer), towers.load_vision_tower(), prior
    ).save_pretrained(str(prior_folder))
    KandinskyV22Pipeline(
        unet=unet, scheduler=kandinsky2_2.build_scheduler(PREDICTION_TYPE), movq=movq.load_movq(movq.SHAPES_WEIGHTS)
    ).save_pretrained(str(decoder_folder))
    return prior_folder, decoder_folder


def write_sd(directory, trained=True) -> tuple:
    """Write a Stable Diffusion pipeline, and return a tuple of its folder."""
    directory = Path(directory)
    paddle.seed(0)
    unet = sd.build_unet(CHANNELS, LATENT_SIZE, towers.EMBEDDING)
    if trained:
        load_weights(unet, SD)
    tokenizer = build_tokenizer(directory / "tokenizer", vocabulary(), TOKENS)
    text_encoder = towers.load_text_tower(tokenizer, CLIPTextModel)
    sd.assemble_pipeline(vae.load_vae(), text_encoder, tokenizer, unet, build_scheduler()).save_pretrained(
        str(directory)
    )
    return (directory,)


def write_sdxl(directory, trained=True) -> tuple:
    """Write an SDXL pipeline, and return a tuple of its folder. Both text encoders are the same text tower."""
    directory = Path(directory)
    paddle.seed(0)
    unet = sdxl.build_unet(CHANNELS, LATENT_SIZE, towers.EMBEDDING, layers=1, attends=ATTENDS)
    if trained:
        load_weights(unet, SDXL)
    tokenizers = [build_tokenizer(directory / name, vocabulary(), TOKENS) for name in ("tokenizer", "tokenizer_2")]
    StableDiffusionXLPipeline(
        vae=vae.load_vae(),
        text_encoder=towers.load_text_tower(tokenizers[0], CLIPTextModel),
        text_encoder_2=towers.load_text_tower(tokenizers[1]),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=build_scheduler(),
        add_watermarker=False,
    ).save_pretrained(str(directory))
    return (directory,)


def write_sd3(directory, trained=True) -> tuple:
    """Write an SD3 pipeline, and return a tuple of its folder.

    Two of its text encoders are the same text tower. T5 has random weights, with which words still differ.
    """
    directory = Path(directory)
    provide_joint_attention()
    paddle.seed(0)
    transformer = sd3.build_transformer(TRANSFORMER_LAYERS, TRANSFORMER_HEADS, LATENT_SIZE, 4, towers.EMBEDDING)
    if trained:
        load_weights(transformer, SD3)
    tokenizers = [build_tokenizer(directory / name, vocabulary(), TOKENS) for name in ("tokenizer", "tokenizer_2")]
    tokenizer_3 = build_t5_tokenizer(directory / "tokenizer_3", vocabulary())
    autoencoder = vae.load_vae()
    autoencoder.register_to_config(shift_factor=sd3.SHIFT_FACTOR)
    StableDiffusion3Pipeline(
        vae=autoencoder,
        text_encoder=towers.load_text_tower(tokenizers[0]),
        text_encoder_2=towers.load_text_tower(tokenizers[1]),
        text_encoder_3=build_t5(len(tokenizer_3), transformer.config.joint_attention_dim, layers=2, seed=0),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=tokenizer_3,
        transformer=transformer,
        scheduler=sd3.build_scheduler(),
    ).save_pretrained(str(directory))
    return (directory,)


def build_scheduler() -> PNDMScheduler:
    """Stable Diffusion 1.5's noise schedule and sampler, whose images after four steps are poor."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=PREDICTION_TYPE,
    )
