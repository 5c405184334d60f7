"""A tiny Kandinsky 2.2, built offline in seconds, with all classes and code paths of the published one.

The MoVQ is trained (see `movq.py`) and reconstructs 64×64 photographs. Everything else has random weights:
an untrained decoder, and CLIP towers whose embeddings have no meaning but differ between images.
"""

from pathlib import Path

import paddle
from ppdiffusers import (
    DDPMScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
)
from ppdiffusers.transformers import (
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from ppdiffusers_train.toy.models.clip import build_image_processor, text_config, vision_config
from ppdiffusers_train.toy.models.movq import load_movq
from ppdiffusers_train.toy.models.tokenizer import build_tokenizer

EMBEDDING = 64


def build_kandinsky(directory, channels=(32, 64)) -> tuple:
    """Write a prior pipeline and a decoder pipeline, as the hub has them.

    Args:
        directory: the parent of the folders `prior` and `decoder`.
        channels: width of the decoder's UNet at each resolution, multiples of 16.
    Returns:
        The two folders: (prior, decoder).
    """
    prior, decoder = Path(directory) / "prior", Path(directory) / "decoder"
    paddle.seed(0)
    build_prior_pipeline(prior / "tokenizer").save_pretrained(str(prior))
    KandinskyV22Pipeline(unet=build_unet(channels), scheduler=build_scheduler(), movq=load_movq()).save_pretrained(
        str(decoder)
    )
    return prior, decoder


def build_scheduler(prediction_type="epsilon") -> DDPMScheduler:
    """The decoder's noise schedule, with the published model's values."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        clip_sample=False,
        variance_type="learned_range",
        prediction_type=prediction_type,
    )


def build_unet(channels=(32, 64), sample_size=16, attends=()) -> UNet2DConditionModel:
    """The decoder's UNet, conditioned on image embeddings through the time embedding and added keys and values.

    Args:
        attends: whether each resolution has attention; by default all but the highest.
    """
    attends = attends or (False,) + (True,) * (len(channels) - 1)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=8,
        down_block_types=tuple("SimpleCrossAttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in attends),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=tuple(
            "SimpleCrossAttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in reversed(attends)
        ),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=EMBEDDING,
        attention_head_dim=16,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="image",
        encoder_hid_dim=EMBEDDING,
        encoder_hid_dim_type="image_proj",
    )
    # No job trains the variance channels. At 0 they mean half way between the smallest and the largest variance.
    with paddle.no_grad():
        unet.conv_out.weight[4:] = 0.0
        unet.conv_out.bias[4:] = 0.0
    return unet


def build_prior_pipeline(tokenizer_directory) -> KandinskyV22PriorPipeline:
    """The prior with both CLIP towers, at random weights."""
    tokenizer = build_tokenizer(tokenizer_directory)
    text_encoder = CLIPTextModelWithProjection(text_config(tokenizer, EMBEDDING, layers=2, heads=4))
    image_encoder = CLIPVisionModelWithProjection(vision_config(EMBEDDING, 2, 4, intermediate=2 * EMBEDDING))
    prior = build_prior()
    with paddle.no_grad():
        prior.clip_std.set_value(paddle.ones_like(prior.clip_std))  # a fresh one is 0, and the prior divides by it
    return assemble_prior_pipeline(tokenizer, text_encoder, image_encoder, prior)


def build_prior(layers=2, tokens=77) -> PriorTransformer:
    """The prior at random weights, for captions of this many tokens."""
    return PriorTransformer(
        num_attention_heads=4,
        attention_head_dim=EMBEDDING // 4,
        num_layers=layers,
        embedding_dim=EMBEDDING,
        num_embeddings=tokens,
        additional_embeddings=4,
    )


def assemble_prior_pipeline(tokenizer, text_encoder, image_encoder, prior) -> KandinskyV22PriorPipeline:
    """A prior's pipeline of these parts, with the published model's scheduler."""
    return KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log",
            num_train_timesteps=1000,
            clip_sample=True,
            clip_sample_range=5.0,
            prediction_type="sample",
        ),
        image_processor=build_image_processor(),
    )
