"""Kandinsky 2.2's two pipelines on disk, and the combined one that generates images from prompts."""

from functools import cached_property

import numpy as np
import paddle
from ppdiffusers import KandinskyV22CombinedPipeline, PriorTransformer, UNet2DConditionModel, VQModel
from ppdiffusers.transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.exported_size import exported_bytes
from ppdiffusers_train.models.generation import generate_images
from ppdiffusers_train.models.part_settings import check_settings
from ppdiffusers_train.models.pipeline_folder import PipelineFolder, export_pipeline
from ppdiffusers_train.models.text import tokenize

VERSION = 1  # raised when its functions change encoded samples
DECODER_PARTS = {"unet": UNet2DConditionModel, "movq": VQModel, "scheduler": None}
PRIOR_PARTS = {
    "prior": PriorTransformer,
    "image_encoder": CLIPVisionModelWithProjection,
    "text_encoder": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "scheduler": None,  # its class is the one that the pipeline's model_index.json names
    "image_processor": CLIPImageProcessor,
}


class WithImageEmbeddings:
    """What the training modules of the decoder and the prior have in common: CLIP's embedding of an image."""

    shared = ("embed_image",)

    def embed_image(self, pixels):
        """[B, 3, H, W] as CLIP's image processor gives them -> [B, D]."""
        return self.image_encoder(pixels).image_embeds

    def embed_images_and_prompts(self, images, prompts) -> tuple:
        """CLIP's embeddings [N, D] of PIL images and of texts, as NumPy arrays, by the towers of the prior's pipeline.
        Those that the job does not have, or no longer, are loaded and freed again."""
        towers = ("image_processor", "image_encoder", "tokenizer", "text_encoder")
        load = self.folders.prior.load
        processor, image_encoder, tokenizer, text_encoder = (
            getattr(self, name, None) or load(name, PRIOR_PARTS[name]) for name in towers
        )
        found = [], []
        for image, prompt in zip(images, prompts):
            pixels = processor(image, return_tensors="np").pixel_values
            found[0].append(image_encoder(paddle.to_tensor(pixels)).image_embeds[0].astype("float32").numpy())
            ids = paddle.to_tensor(tokenize(tokenizer, prompt)[0][None])
            found[1].append(text_encoder(ids).text_embeds[0].astype("float32").numpy())
        return tuple(map(np.stack, found))


class KandinskyFolders:
    """The decoder's and the prior's folder, each opened on first use.

    A folder of the combined pipeline serves as either.

    Args:
        decoder, prior: folders, or names on the hub.
        cache_dir, variant, weights: see `PipelineFolder`.
    """

    def __init__(self, decoder, prior, cache_dir=None, variant=None, weights=True):
        self.names = decoder, prior
        self.options = {"cache_dir": cache_dir, "variant": variant, "weights": weights}

    @cached_property
    def decoder(self) -> PipelineFolder:
        """The decoder's folder. A `UserError` when it is no such pipeline."""
        flag = "--pretrained_decoder_model_name_or_path"
        folder = PipelineFolder(self.names[0], flag, list(DECODER_PARTS), **self.options)
        check_settings(folder, DECODER_PARTS)
        return folder

    @cached_property
    def prior(self) -> PipelineFolder:
        """The prior's folder. A `UserError` when it is no such pipeline."""
        flag, aliases = "--pretrained_prior_model_name_or_path", {part: f"prior_{part}" for part in PRIOR_PARTS}
        folder = PipelineFolder(self.names[1], flag, list(PRIOR_PARTS), aliases, **self.options)
        check_settings(folder, PRIOR_PARTS)
        return folder

    def check_resolution(self, resolution: int) -> None:
        """Raise a `UserError` unless images of `resolution` fit MoVQ and UNet, without loading either."""
        movq, unet = self.decoder.config("movq"), self.decoder.config("unet")
        factor = 2 ** (len(movq["block_out_channels"]) + len(unet["block_out_channels"]) - 2)
        if resolution % factor:
            raise UserError(f"--resolution: {resolution} does not fit this decoder; expected a multiple of {factor}")

    def check_clip_std(self, prior) -> None:
        """Raise a `UserError` when a prior cannot normalise embeddings."""
        if self.options["weights"] and not bool((prior.clip_std != 0).all()):
            raise UserError(
                f"--pretrained_prior_model_name_or_path: the prior of {str(self.names[1])!r} has a clip_std of 0, "
                "which embeddings are divided by; expected their standard deviation"
            )

    def generate(self, own: dict, prompts, seeds, resolution: int, inference_steps: int, options=None) -> list:
        """One PIL image per pair of prompt and seed, by prior and decoder as in inference. Parts that are not in `own`,
        or None there, are loaded, and freed again.

        Args:
            own: {name in the combined pipeline: part to use}.
            inference_steps: number of denoising steps of each of the two.
            options: the `own` arguments of `generate_images`.
        """
        parts = {
            name: folder.load(part, part_class) if own.get(name) is None else own[name]
            for name, (folder, part, part_class) in self._combined_parts().items()
        }
        return generate_images(
            KandinskyV22CombinedPipeline(**parts), prompts, seeds, resolution, inference_steps, options,
            prior_num_inference_steps=max(inference_steps, 2),  # the prior's scheduler needs at least two
        )  # fmt: skip

    def files(self) -> dict:
        """`{part: its files}` of the combined pipeline."""
        return {name: folder.files(part) for name, (folder, part, _) in self._combined_parts().items()}

    def export_combined(self, directory, own: dict, save_format: str) -> None:
        """Write a folder for `KandinskyV22CombinedPipeline.from_pretrained`: `own` parts saved, the others unchanged.

        Args:
            own: {name in the combined pipeline: trained model}.
            save_format: the library to write for, "ppdiffusers" or "diffusers".
        """
        export_pipeline(directory, "KandinskyV22CombinedPipeline", self._combined_parts(), own, save_format)

    def export_prior(self, directory, own: dict, save_format: str) -> None:
        """Write a prior pipeline's folder: `own` parts saved, the others unchanged, the scheduler for inference."""
        parts = dict(_with_classes(self.prior, PRIOR_PARTS))
        export_pipeline(directory, "KandinskyV22PriorPipeline", parts, own, save_format)

    def exported_bytes(self, own: str, *where) -> int:
        """Bytes of all parts but `own` in an export, that of the prior for the prior, else the combined one; `where`
        are the last arguments of `exported_size.exported_bytes`."""
        parts = dict(_with_classes(self.prior, PRIOR_PARTS)) if own == "prior" else self._combined_parts()
        return sum(
            exported_bytes(folder.weights(part), *where) for name, (folder, part, _) in parts.items() if name != own
        )

    def _combined_parts(self) -> dict:
        prior = {f"prior_{part}": source for part, source in _with_classes(self.prior, PRIOR_PARTS)}
        return {**dict(_with_classes(self.decoder, DECODER_PARTS)), **prior}


def _with_classes(folder: PipelineFolder, parts: dict):
    """(part, (folder, part, its class)) of all `parts`."""
    for part, part_class in parts.items():
        yield part, (folder, part, part_class or folder.scheduler_class(part))
