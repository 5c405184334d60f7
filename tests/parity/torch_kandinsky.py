"""A tiny Kandinsky 2.2 that diffusers and transformers build and save: the other side of the comparisons."""

from pathlib import Path

from diffusers import (
    DDPMScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ppdiffusers_train.toy.models.tokenizer import build_tokenizer
from tests.parity.common import write_pipeline

WIDTH = 32


def save_decoder(folder, prediction_type):
    """Write a decoder pipeline as diffusers does."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=16,
        norm_num_groups=8,  # with a channel to a group, norms would take biases away
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="image",
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
    )
    movq = VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32, 32),
        latent_channels=4,
        num_vq_embeddings=16,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        clip_sample=False,
        variance_type="learned_range",
        prediction_type=prediction_type,
    )
    return write_pipeline(KandinskyV22Pipeline(unet=unet, movq=movq, scheduler=scheduler), str(folder))


def save_prior(folder):
    """Write a prior pipeline as diffusers does."""
    build_tokenizer(Path(folder) / "tokenizer")
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, embedding_dim=WIDTH, num_embeddings=77
    )
    pipeline = KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, projection_dim=WIDTH, image_size=32, patch_size=8)
        ),
        text_encoder=CLIPTextModelWithProjection(
            CLIPTextConfig(**sizes, projection_dim=WIDTH, vocab_size=514, max_position_embeddings=77)
        ),
        tokenizer=CLIPTokenizer.from_pretrained(str(Path(folder) / "tokenizer")),
        scheduler=UnCLIPScheduler(prediction_type="sample"),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    return write_pipeline(pipeline, str(folder))
