"""Stable Diffusion XL on disk, and what its text encoders and VAE make of a sample."""

import paddle
from ppdiffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel, schedulers
from ppdiffusers.transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.pipeline_folder import ModelFolder, PipelineFolder, export_pipeline

PARTS = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
    "unet": UNet2DConditionModel,
    "scheduler": None,  # its class is the one that the pipeline's model_index.json names
}


class SDXLFolder:
    """The folder of an SDXL pipeline, with a VAE from elsewhere where one is given.

    Args:
        name_or_path, vae: folders, or names on the hub; `vae` may be None.
        flag: that named the pipeline, for messages.
        cache_dir, revision, variant, weights: see `PipelineFolder`.
    """

    def __init__(self, name_or_path, vae, flag, cache_dir=None, revision=None, variant=None, weights=True):
        options = {"cache_dir": cache_dir, "weights": weights}
        self.base = PipelineFolder(name_or_path, flag, list(PARTS), revision=revision, variant=variant, **options)
        vae_flag = "--pretrained_vae_model_name_or_path"
        self.vae = ModelFolder(vae, vae_flag, "vae", "AutoencoderKL", **options) if vae else self.base

    def folder(self, part: str) -> PipelineFolder:
        """The folder that holds a part."""
        return self.vae if part == "vae" else self.base

    def load(self, part: str, part_class=None):
        """A part, of `part_class` where it is not the pipeline's own."""
        return self.folder(part).load(part, part_class or self.part_class(part))

    def part_class(self, part: str):
        """The class of a part in the pipeline."""
        return PARTS[part] or getattr(schedulers, self.base.class_name(part))

    def check_resolution(self, resolution: int) -> None:
        """Raise a `UserError` unless images of `resolution` fit the VAE."""
        factor = 2 ** (len(self.vae.config("vae")["block_out_channels"]) - 1)
        if resolution % factor:
            raise UserError(f"--resolution: {resolution} does not fit this VAE; expected a multiple of {factor}")

    def pipeline(self, **own) -> StableDiffusionXLPipeline:
        """The pipeline that draws; parts given by name are used, those that are None or not named are loaded."""
        parts = {name: self.load(name) if own.get(name) is None else own[name] for name in PARTS}
        return StableDiffusionXLPipeline(**parts, **self._settings(), add_watermarker=False)

    def export(self, directory, own: dict, save_format: str) -> None:
        """Write a folder for `StableDiffusionXLPipeline.from_pretrained`: `own` parts saved, the others unchanged."""
        parts = {name: (self.folder(name), name, self.part_class(name)) for name in PARTS}
        export_pipeline(directory, "StableDiffusionXLPipeline", parts, own, save_format, self._settings())

    def _settings(self) -> dict:
        index = self.base.index()
        return {name: index[name] for name in ("force_zeros_for_empty_prompt",) if name in index}


def encode_prompts(text_encoder, text_encoder_2, input_ids, input_ids_2) -> tuple:
    """Token ids [B, L] of both tokenizers -> prompt embeddings [B, L, D1 + D2], pooled embedding [B, D].

    The penultimate hidden states of both encoders, and the second one's projection (Podell et al. 2023, arXiv
    2307.01952, section 2.1).
    """
    first = text_encoder(input_ids, output_hidden_states=True)
    second = text_encoder_2(input_ids_2, output_hidden_states=True)
    return paddle.concat([first.hidden_states[-2], second.hidden_states[-2]], axis=-1), second[0]


def encode_images(vae, pixels):
    """Pixels [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, h, w]: the mode of the VAE's distribution.

    Computed in the VAE's own type whatever the run's precision: SDXL's VAE overflows in float16. The mode, not a draw:
    its deviation is far below the noise that training adds, and a cached sample must be a function of the image.
    """
    with paddle.amp.auto_cast(enable=False):
        latents = vae.encode(pixels.astype(vae.dtype)).latent_dist.mode()
    return latents * vae.config.scaling_factor
