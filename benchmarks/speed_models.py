"""The models of `speed.py`, of random weights, written by diffusers: a process of its own, because it needs torch.

    python benchmarks/speed_models.py FOLDER JOB SIZE

Both sides load the same files.
"""

import ppdiffusers_train  # noqa: F401

import json
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ppdiffusers_train.toy.models.tokenizer import build_tokenizer

HEAD = 64  # channels of a head of attention
VOCABULARY, POSITIONS = 514, 77  # of the toys' tokenizer


class Sizes:
    """Widths and depths at a size: parameters grow with it, so widths with its root. Below 0.1, the smallest of all."""

    def __init__(self, size: float):
        self.factor, self.is_tiny = size**0.5, size < 0.1
        self.pixels = 32 if self.is_tiny else 224

    def width(self, width: int, multiple: int = HEAD) -> int:
        return max(1, round(width * self.factor / multiple)) * multiple

    def layers(self, layers: int) -> int:
        return 1 if self.is_tiny else layers

    def channels(self, *widths) -> tuple:
        return tuple(self.width(width, 32) for width in widths)

    def transformer(self, width: int, layers: int) -> dict:
        """Of a CLIP encoder."""
        width = self.width(width)
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": self.layers(layers),
            "num_attention_heads": width // HEAD,
        }

    def text_config(self, width: int, layers: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            **self.transformer(width, layers), projection_dim=self.width(width), vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS, eos_token_id=VOCABULARY - 1, bos_token_id=VOCABULARY - 2,
        )  # fmt: skip


def kandinsky(folder: Path, sizes: Sizes) -> dict:
    """The prior's and the decoder's pipeline: UNet 35 M, MoVQ 5.5 M, CLIP vision 60 M, prior 27 M, text 26 M."""
    embedding = sizes.width(512)
    build_tokenizer(folder / "prior" / "tokenizer")
    parts = {
        "unet": UNet2DConditionModel(
            sample_size=32,
            in_channels=4,
            out_channels=8,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            block_out_channels=sizes.channels(96, 224, 320),
            layers_per_block=1,
            cross_attention_dim=embedding,
            attention_head_dim=32,
            resnet_time_scale_shift="scale_shift",
            addition_embed_type="image",
            encoder_hid_dim=embedding,
            encoder_hid_dim_type="image_proj",
        ),
        "movq": VQModel(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=sizes.channels(64, 128, 160),
            latent_channels=4,
            num_vq_embeddings=1024,
            vq_embed_dim=4,
            norm_type="spatial",
        ),
        "prior": PriorTransformer(
            num_attention_heads=embedding // HEAD,
            attention_head_dim=HEAD,
            num_layers=sizes.layers(8),
            embedding_dim=embedding,
            num_embeddings=POSITIONS,
        ),
        "image_encoder": CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                **sizes.transformer(640, 12),
                projection_dim=embedding,
                image_size=sizes.pixels,
                patch_size=8 if sizes.is_tiny else 14,
            )
        ),
        "text_encoder": CLIPTextModelWithProjection(sizes.text_config(512, 8)),
    }
    torch.nn.init.ones_(parts["prior"].clip_std)  # a fresh one is 0, and the job divides by it
    side = {"height": sizes.pixels, "width": sizes.pixels}
    KandinskyV22PriorPipeline(
        **{name: parts[name] for name in ("prior", "image_encoder", "text_encoder")},
        tokenizer=CLIPTokenizer.from_pretrained(str(folder / "prior" / "tokenizer")),
        scheduler=UnCLIPScheduler(prediction_type="sample"),
        image_processor=CLIPImageProcessor(size={"shortest_edge": sizes.pixels}, crop_size=side),
    ).save_pretrained(folder / "prior")
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, variance_type="learned_range"
    )
    KandinskyV22Pipeline(unet=parts["unet"], movq=parts["movq"], scheduler=scheduler).save_pretrained(
        folder / "decoder"
    )
    return parts


def vae(sizes: Sizes) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=sizes.channels(64, 96, 160),
        latent_channels=4,
        sample_size=128,
    )


def unet(sizes: Sizes, width: int, **options) -> UNet2DConditionModel:
    """A UNet as Stable Diffusion's, told of captions of `width` channels."""
    return UNet2DConditionModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=sizes.channels(128, 192, 320),
        layers_per_block=1,
        cross_attention_dim=width,
        **options,
    )


def stable_diffusion_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def sdxl(folder: Path, sizes: Sizes) -> dict:
    """SDXL's pipeline, with two text encoders of 26 M."""
    tokenizers = []
    for name in ("tokenizer", "tokenizer_2"):
        build_tokenizer(folder / name)
        tokenizers.append(CLIPTokenizer.from_pretrained(str(folder / name)))
    width = sizes.width(512)
    parts = {
        "unet": unet(
            sizes,
            2 * width,
            attention_head_dim=4,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 1, sizes.layers(2)),
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=width + 6 * 32,
        ),
        "vae": vae(sizes),
        "text_encoder": CLIPTextModel(sizes.text_config(512, 8)),
        "text_encoder_2": CLIPTextModelWithProjection(sizes.text_config(512, 8)),
    }
    StableDiffusionXLPipeline(
        **parts, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], scheduler=stable_diffusion_scheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return parts


def stable_diffusion(folder: Path, sizes: Sizes) -> dict:
    """Stable Diffusion's pipeline: the teacher."""
    build_tokenizer(folder / "tokenizer")
    parts = {
        "unet": unet(sizes, sizes.width(512), attention_head_dim=4),
        "vae": vae(sizes),
        "text_encoder": CLIPTextModel(sizes.text_config(512, 8)),
    }
    StableDiffusionPipeline(
        **parts, tokenizer=CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
        scheduler=stable_diffusion_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return parts


BUILDERS = {"decoder": kandinsky, "prior": kandinsky, "sdxl": sdxl, "lcm_lora": stable_diffusion}


def main():
    folder, job, size = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    torch.manual_seed(0)
    parts = BUILDERS[job](folder, Sizes(size))
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    (folder / "parameters.json").write_text(json.dumps(counts), encoding="utf-8")


if __name__ == "__main__":
    main()
