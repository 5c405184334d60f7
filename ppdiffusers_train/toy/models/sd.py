"""UNet of a tiny Stable Diffusion 1.5, with all code paths of the published one, and a pipeline of such parts."""

from ppdiffusers import StableDiffusionPipeline, UNet2DConditionModel

from ppdiffusers_train.toy.models.sdxl import EMBEDDING


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
