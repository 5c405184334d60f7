"""Fine-tune Qwen-Image with LoRA: the result is a small file, and the pipeline stays as it is.

    python -u train_qwen_image_lora.py --pretrained_model_name_or_path Qwen-Image --train_data_dir photos \\
        --output_dir my-lora

The result is loaded by `load_lora_weights("my-lora")` of `ppdiffusers_train.QwenImagePipeline`, and by diffusers.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

import math
from dataclasses import replace
from functools import partial

import numpy as np
import paddle

from ppdiffusers_train.data.buckets import bucket_sizes, size_for
from ppdiffusers_train.data.rows import refuse_small_image, warn_of_small_images
from ppdiffusers_train.data.tags import draw_caption
from ppdiffusers_train.data.transforms import fit, fit_mask, normalize_pixels
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.job import FullTraining, LoRATraining, job_main, named_by_flags
from ppdiffusers_train.models.attention import announce_joint_attention
from ppdiffusers_train.models.attention_slices import enable_sliced_attention
from ppdiffusers_train.models.generation import generate_images
from ppdiffusers_train.models.lora import JOINT_ATTENTION_TARGETS
from ppdiffusers_train.models.masks import encode_masks
from ppdiffusers_train.models.qwen_image.loading import VERSIONS, QwenImageFolder, encode_caption, packed, unpacked
from ppdiffusers_train.models.qwen_image.pipeline import QwenImagePipeline
from ppdiffusers_train.models.qwen_image.tokenizer import LONGEST
from ppdiffusers_train.models.recompute import enable_recompute
from ppdiffusers_train.models.weights import load_unread, load_values
from ppdiffusers_train.objectives.denoising import perturb_noise
from ppdiffusers_train.objectives.flow_matching import interpolate, timestep_weighting, velocity
from ppdiffusers_train.objectives.losses import area_weights, mse_loss
from ppdiffusers_train.runtime.precision import computes_in_low_precision

SHIFT = math.exp(0.8)  # of timesteps, for images of any size, as DiffSynth-Studio trains Qwen-Image
NO_PROMPT = " "  # the negative prompt of validation images


def build_parser():
    parser = arguments.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_folder_arguments(parser)
    arguments.add_image_arguments(parser)
    group = arguments.add_flow_matching_arguments(parser)
    group.add_argument(
        "--dynamic_shift", action=arguments.Flag,
        help="Shift timesteps by each image's number of tokens, as inference does, instead of by --shift.",
    )  # fmt: skip
    arguments.add_run_arguments(parser, "qwen-image-lora", num_validation_images=4, validation_epochs=1)
    arguments.add_lora_arguments(parser, JOINT_ATTENTION_TARGETS, rank=32)
    parser.set_defaults(
        resolution=512, train_batch_size=1, num_train_epochs=50, learning_rate=1e-5, weighting_scheme="bell",
        shift=SHIFT, gradient_checkpointing=True, mixed_precision="bf16", encoded_cache=True, save_format="diffusers",
    )  # fmt: skip
    return parser


class QwenImageTraining(FullTraining):
    """Trains the transformer to predict the velocity from an image's latents to noise, conditioned on the caption."""

    title = "Qwen-Image"
    trained = "transformer"
    encoders = ("vae", "text_encoder")

    def __init__(self, args):
        super().__init__()
        self.args, self.tables = args, {}
        self.type = "bfloat16" if args.mixed_precision == "bf16" and computes_in_low_precision() else "float32"
        options = {"revision": args.revision, "variant": args.variant, "weights": not args.dry_run}
        flag = "--pretrained_model_name_or_path"
        self.folder = QwenImageFolder(
            args.pretrained_model_name_or_path, flag, cache_dir=args.cache_dir, **options
        )  # fmt: skip
        if args.resolution % self.folder.pixels_per_token():
            expected = f"expected a multiple of {self.folder.pixels_per_token()}"
            raise UserError(f"--resolution: {args.resolution} does not fit this model; {expected}")
        self.table(256)  # any size: whether the flags fit
        self.tokenizer = self.folder.load("tokenizer")
        self.load_later("vae", self.folder.later("vae"))
        # Float32 copies would be too large: values are read one by one, and cast, or quantized before training.
        encoder = self.folder.later("text_encoder")
        narrow = replace(encoder, load=lambda: load_values(load_unread(encoder.load), self.type))
        self.load_later("text_encoder", narrow)
        self.transformer = load_unread(partial(self.folder.load, "transformer"))
        if args.quantize_base == "no":
            load_values(self.transformer, self.type)
        if args.gradient_checkpointing:
            enable_recompute(self.transformer)
        if args.enable_xformers_memory_efficient_attention:
            announce_joint_attention()
        if args.attention_slices == "auto":
            enable_sliced_attention(self.transformer)

    def table(self, tokens: int) -> tuple:
        """σ of each timestep, its probability, and its loss weight (or None) for images of so many tokens, [T] each."""
        args, settings = self.args, self.folder.schedule
        key = tokens if args.dynamic_shift else 0
        if key not in self.tables:
            shift = None if args.dynamic_shift else args.shift
            sigmas = settings.sigmas(settings.num_train_timesteps, tokens, shift)
            with named_by_flags():
                density, weights = timestep_weighting(
                    args.weighting_scheme, sigmas, args.min_timestep_boundary, args.max_timestep_boundary,
                    args.logit_mean, args.logit_std, args.mode_scale,
                )  # fmt: skip
            self.tables[key] = paddle.to_tensor(sigmas), density, weights
        return self.tables[key]

    @property
    def buckets(self):
        return bucket_sizes(self.args.resolution) if self.args.aspect_ratio_buckets else ()

    def preprocess(self, row, draws):
        """pixel_values [3, H, W]; mask [1, H, W] if there is one; input_ids [L] and their mask, which is 1."""
        args, image = self.args, row["image"]
        refuse_small_image(row, args.min_image_size)
        size = size_for(*image.size, args.resolution, self.buckets)
        image, *_ = fit(image, *size, draws, args.image_interpolation_mode, args.center_crop, args.random_flip)
        area = fit_mask(row, *size, draws, args.center_crop, args.random_flip)
        how = args.proportion_empty_prompts, args.shuffle_tags, args.keep_tags, args.tag_dropout, args.wildcards
        [input_ids] = self.tokenizer([draw_caption(draws, row["caption"], *how)])
        mask = np.ones_like(input_ids)
        return {"pixel_values": normalize_pixels(image), "input_ids": input_ids, "input_ids_mask": mask, **area}

    def encoding_settings(self):
        names = ["resolution", "center_crop", "random_flip", "image_interpolation_mode", "proportion_empty_prompts"]
        names += ["shuffle_tags", "keep_tags", "tag_dropout", "wildcards", "min_image_size"]
        vae = self.folder.base.config("vae")
        return {
            **{name: getattr(self.args, name) for name in names},
            "buckets": self.buckets,
            "code": VERSIONS,
            "scale": [vae.get("latents_mean"), vae.get("latents_std")],
            "tokenizer": self.tokenizer.get_vocab(),
        }

    def encode(self, batch):
        """latents [1, C, h, w]; prompt_embeds [1, L, D], without padding, and their mask, which is 1."""
        length = int(batch["input_ids_mask"].sum())
        states = encode_caption(self.text_encoder, batch["input_ids"][:, :length])
        mask = paddle.ones(states.shape[:2], "int64")
        latents = self.vae.encode(batch["pixel_values"])
        captions = {"prompt_embeds": states, "prompt_embeds_mask": mask}
        return {"latents": latents, **captions, **encode_masks(batch, latents)}

    def inspect_dataset(self, dataset):
        warn_of_small_images(dataset, self.args.resolution)

    def forward(self, encoded, draws):
        latents = encoded["latents"]
        count, _, height, width = latents.shape
        grid = height // 2, width // 2
        sigmas, density, weights = self.table(grid[0] * grid[1])
        noise = draws.normal("noise", latents.shape[1:])
        steps = draws.categorical("timesteps", density)
        noisy = interpolate(latents, perturb_noise(draws, noise, self.args.input_perturbation), sigmas[steps])
        mask = encoded["prompt_embeds_mask"] if count > 1 else None  # a sample by itself is not padded
        prediction = self.transformer(packed(noisy), encoded["prompt_embeds"], mask, sigmas[steps], grid)
        target = velocity(latents, noise)
        area = area_weights(encoded.get("mask"), self.args.masked_area_weight)
        return mse_loss(unpacked(prediction, grid), target, None if weights is None else weights[steps], area)

    def generate(self, prompts, seeds, options=None):
        parts = {name: getattr(self, name) for name in self.folder.parts}
        pipeline, args = QwenImagePipeline.from_folder(self.folder, **parts), self.args
        names = {"guidance_scale": "true_cfg_scale"}  # what this pipeline calls it
        own = [{names.get(name, name): value for name, value in more.items()} for more in options or ()]
        how = args.resolution, args.validation_inference_steps, own
        same = {"negative_prompt": NO_PROMPT, "max_sequence_length": LONGEST}
        return generate_images(pipeline, prompts, seeds, *how, **same)

    def card_data(self):
        tags = ["qwen-image", "text-to-image", "ppdiffusers"]
        return {"base_model": self.args.pretrained_model_name_or_path, "tags": tags}


class QwenImageLoRATrainingModule(LoRATraining, QwenImageTraining):
    """Trains LoRA layers on the queries, keys and values of both streams."""


main = job_main(build_parser, QwenImageLoRATrainingModule)

if __name__ == "__main__":
    main()
