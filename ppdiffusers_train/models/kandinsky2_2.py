"""Kandinsky 2.2's two pipelines on disk, and the combined one that draws."""

import inspect
import json
from pathlib import Path

import paddle
import ppdiffusers
from ppdiffusers import KandinskyV22CombinedPipeline, PriorTransformer, UNet2DConditionModel, VQModel, schedulers
from ppdiffusers.transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.pipeline_folder import PipelineFolder

DECODER_PARTS = {"unet": UNet2DConditionModel, "movq": VQModel, "scheduler": None}
PRIOR_PARTS = {
    "prior": PriorTransformer,
    "image_encoder": CLIPVisionModelWithProjection,
    "text_encoder": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "scheduler": None,  # its class is the one that the pipeline's model_index.json names
    "image_processor": CLIPImageProcessor,
}


class KandinskyFolders:
    """The decoder's and the prior's folder. A folder of the combined pipeline serves as either.

    Args:
        decoder, prior: folders, or names on the hub.
        cache_dir: of downloads.
    Raises:
        UserError: one of them is no such pipeline.
    """

    def __init__(self, decoder, prior, cache_dir=None):
        self.decoder = PipelineFolder(
            decoder, "--pretrained_decoder_model_name_or_path", list(DECODER_PARTS), cache_dir=cache_dir
        )
        self.prior = PipelineFolder(
            prior,
            "--pretrained_prior_model_name_or_path",
            list(PRIOR_PARTS),
            aliases={part: f"prior_{part}" for part in PRIOR_PARTS},
            cache_dir=cache_dir,
        )

    def _parts(self):
        """(name in the combined pipeline, folder, part, class) of all its parts."""
        for folder, parts, prefix in ((self.decoder, DECODER_PARTS, ""), (self.prior, PRIOR_PARTS, "prior_")):
            for part, part_class in parts.items():
                yield f"{prefix}{part}", folder, part, part_class or getattr(schedulers, folder.class_name(part))

    def combined_pipeline(self, **own):
        """The pipeline that draws from a prompt; parts given by name are used, those that are None are loaded, too."""
        parts = {
            name: folder.load(part, part_class) if own.get(name) is None else own[name]
            for name, folder, part, part_class in self._parts()
        }
        return KandinskyV22CombinedPipeline(**parts)

    def export_combined(self, directory, own: dict) -> None:
        """Write a folder for `KandinskyV22CombinedPipeline.from_pretrained`: `own` parts saved, the others unchanged.

        Args:
            own: {name in the combined pipeline: trained model}.
        """
        directory = Path(directory)
        index = {
            "_class_name": KandinskyV22CombinedPipeline.__name__,
            "_ppdiffusers_version": ppdiffusers.__version__,
        }
        for name, folder, part, part_class in self._parts():
            if name in own:
                own[name].save_pretrained(str(directory / name))
            else:
                folder.export(part, part_class, directory / name)
            library = inspect.getmodule(part_class).__name__
            is_transformer = library.startswith(("ppdiffusers.transformers", "paddlenlp"))
            index[name] = ["ppdiffusers.transformers" if is_transformer else "ppdiffusers", part_class.__name__]
        (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_resolution(folders: KandinskyFolders, resolution: int) -> None:
    """Raise a `UserError` unless images of `resolution` fit MoVQ and UNet, without loading either."""
    movq, unet = folders.decoder.config("movq"), folders.decoder.config("unet")
    factor = 2 ** (len(movq["block_out_channels"]) + len(unet["block_out_channels"]) - 2)
    if resolution % factor:
        raise UserError(f"--resolution: {resolution} does not fit this decoder; expected a multiple of {factor}")


def draw(pipeline, prompts, seeds, resolution: int, inference_steps: int, **options) -> list:
    """One PIL image per pair of prompt and seed. Paddle's generator is seeded for each: it stands for itself."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for prompt, seed in zip(prompts, seeds):
        paddle.seed(seed)
        images += pipeline(
            prompt, height=resolution, width=resolution, num_inference_steps=inference_steps, **options
        ).images
    return images
