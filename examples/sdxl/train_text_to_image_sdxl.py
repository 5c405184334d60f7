"""Fine-tune Stable Diffusion XL: its UNet learns your images and captions.

    python -u train_text_to_image_sdxl.py --pretrained_model_name_or_path sdxl --train_data_dir photos --output_dir mine

The result is a folder for `StableDiffusionXLPipeline.from_pretrained`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)

import numpy as np
from ppdiffusers import DDPMScheduler

from ppdiffusers_train.arguments import (
    ArgumentParser,
    Flag,
    add_data_arguments,
    add_diffusion_arguments,
    add_image_arguments,
    add_output_arguments,
    add_pipeline_arguments,
    add_reporting_arguments,
    add_timestep_arguments,
    add_training_arguments,
    add_validation_arguments,
)
from ppdiffusers_train.data.buckets import bucket_sizes, nearest_bucket
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.rows import warn_of_small_images
from ppdiffusers_train.data.transforms import fit, normalize_pixels
from ppdiffusers_train.errors import BadSampleError, UserError, one_line_errors
from ppdiffusers_train.models.attention import announce_plain_attention, enable_memory_efficient_attention
from ppdiffusers_train.models.drawing import draw
from ppdiffusers_train.models.recompute import enable_recompute
from ppdiffusers_train.models.sdxl import SDXLFolder, encode_prompts
from ppdiffusers_train.models.stable_diffusion import encode_images
from ppdiffusers_train.models.text import tokenize
from ppdiffusers_train.models.weights import load_in_place, save_model
from ppdiffusers_train.module import DiffusionTrainingModule, freeze
from ppdiffusers_train.objectives.denoising import denoising_loss, draw_noise
from ppdiffusers_train.objectives.noise_schedule import add_noise
from ppdiffusers_train.objectives.timesteps import timestep_weights
from ppdiffusers_train.training import check_run, launch_training_task

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def build_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    group = add_pipeline_arguments(parser, "folder or hub name of another VAE")
    group.add_argument(
        "--enable_npu_flash_attention", action=Flag, help="accepted for old commands; ppdiffusers has no such kernel"
    )
    group.add_argument("--prediction_type", choices=PREDICTION_TYPES, help="what the UNet predicts; default: as before")
    add_image_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    add_diffusion_arguments(parser, noise_offset=True)
    add_timestep_arguments(parser)
    add_output_arguments(parser, output_dir="sdxl-model-finetuned")
    add_validation_arguments(parser, num_validation_images=4, validation_epochs=1)
    add_reporting_arguments(parser)
    parser.set_defaults(resolution=1024, encoded_cache=True)
    return parser


class SDXLTrainingModule(DiffusionTrainingModule):
    """The UNet learns to denoise VAE latents, given the caption, the image's size, and the crop that was taken."""

    encoders = ("vae", "text_encoder", "text_encoder_2")
    can_compile_encode = True

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.folder = SDXLFolder(
            args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path,
            "--pretrained_model_name_or_path", args.cache_dir, args.revision, args.variant, weights=not args.dry_run,
        )  # fmt: skip
        self.folder.check_resolution(args.resolution)
        self.scheduler = self.folder.load("scheduler", DDPMScheduler)
        if args.prediction_type:
            self.scheduler.register_to_config(prediction_type=args.prediction_type)
        self.timestep_weights = self.build_timestep_weights()
        self.tokenizer, self.tokenizer_2 = self.folder.load("tokenizer"), self.folder.load("tokenizer_2")
        self.text_encoder = freeze(self.folder.load("text_encoder"))
        self.text_encoder_2 = freeze(self.folder.load("text_encoder_2"))
        self.vae = freeze(self.folder.load("vae"))
        self.unet = self.folder.load("unet")
        if args.gradient_checkpointing:
            enable_recompute(self.unet)
        if args.enable_xformers_memory_efficient_attention:
            enable_memory_efficient_attention(self.unet)
        if args.enable_npu_flash_attention:
            announce_plain_attention("ppdiffusers has no kernel for NPUs", "--enable_npu_flash_attention")

    def build_timestep_weights(self):
        """The probability of each timestep, or None where all are alike."""
        args, count = self.args, self.scheduler.config.num_train_timesteps
        if args.timestep_bias_strategy == "none":
            return None
        try:
            return timestep_weights(
                args.timestep_bias_strategy, count, args.timestep_bias_multiplier, args.timestep_bias_portion,
                args.timestep_bias_begin, args.timestep_bias_end,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"--{error}") from error

    @property
    def buckets(self):
        return bucket_sizes(self.args.resolution) if self.args.aspect_ratio_buckets else ()

    def size_for(self, width, height):
        """Height and width that an image of this size is brought to."""
        sizes = self.buckets or [(self.args.resolution, self.args.resolution)]
        return sizes[nearest_bucket(sizes, width, height)]

    def preprocess(self, row, draws):
        """pixel_values [3, H, W]; input_ids, input_ids_2 [L]; has_prompt [], 0 where the embeddings are to be zeros;
        time_ids [6]: height and width of the file, top and left of the crop, height and width of what is drawn."""
        args, image = self.args, row["image"]
        width, height = image.size
        if args.min_image_size and min(width, height) < args.min_image_size:
            raise BadSampleError(f"{row['name']}: {width} x {height} pixels, --min_image_size is {args.min_image_size}")
        rows, columns = self.size_for(width, height)
        image, top, left = fit(
            image, rows, columns, draws, args.image_interpolation_mode, args.center_crop, args.random_flip
        )
        dropped = draws.happens("drop_caption", args.proportion_empty_prompts)
        caption = "" if dropped else row["caption"]
        return {
            "pixel_values": normalize_pixels(image),
            "time_ids": np.float32([height, width, top, left, rows, columns]),
            "input_ids": tokenize(self.tokenizer, caption)[0],
            "input_ids_2": tokenize(self.tokenizer_2, caption)[0],
            "has_prompt": np.float32(not (dropped and self.folder.no_prompt_is_zeros)),
        }

    def encoding_settings(self):
        names = ["resolution", "center_crop", "random_flip", "image_interpolation_mode", "proportion_empty_prompts"]
        return {
            **{name: getattr(self.args, name) for name in [*names, "min_image_size"]},
            "buckets": self.buckets,
            "scaling_factor": self.vae.config.scaling_factor,
            "no_prompt_is_zeros": self.folder.no_prompt_is_zeros,
            "tokenizers": [self.tokenizer.get_vocab(), self.tokenizer_2.get_vocab()],
        }

    def encode(self, batch):
        """latents [B, 4, h, w], scaled; prompt_embeds [B, L, D]; pooled_prompt_embeds [B, P]; time_ids [B, 6]."""
        embeds, pooled = encode_prompts(
            self.text_encoder, self.text_encoder_2, batch["input_ids"], batch["input_ids_2"], batch["has_prompt"]
        )
        return {
            "latents": encode_images(self.vae, batch["pixel_values"]),
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "time_ids": batch["time_ids"],
        }

    def forward(self, encoded, draws):
        latents, schedule = encoded["latents"], self.scheduler.alphas_cumprod
        noise = draw_noise(draws, latents.shape[1:], self.args.noise_offset)
        if self.timestep_weights is None:
            timesteps = draws.integers("timesteps", 0, self.scheduler.config.num_train_timesteps)
        else:
            timesteps = draws.categorical("timesteps", self.timestep_weights)
        prediction = self.unet(
            add_noise(schedule, latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=encoded["prompt_embeds"],
            added_cond_kwargs={"text_embeds": encoded["pooled_prompt_embeds"], "time_ids": encoded["time_ids"]},
        ).sample
        prediction_type = self.scheduler.config.prediction_type
        return denoising_loss(prediction, prediction_type, schedule, latents, noise, timesteps, self.args.snr_gamma)

    def inference_scheduler(self):
        """The pipeline's own scheduler, with the prediction type that was trained."""
        scheduler = self.folder.load("scheduler")
        scheduler.register_to_config(prediction_type=self.scheduler.config.prediction_type)
        return scheduler

    def generate(self, prompts, seeds):
        pipeline = self.folder.pipeline(
            unet=self.unet, vae=self.vae, text_encoder=self.text_encoder, text_encoder_2=self.text_encoder_2,
            scheduler=self.inference_scheduler(),
        )  # fmt: skip
        return draw(pipeline, prompts, seeds, self.args.resolution, self.args.validation_inference_steps)

    def save_weights(self, directory):
        save_model(self.unet, f"{directory}/unet")

    def load_weights(self, directory):
        load_in_place(self.unet, f"{directory}/unet")

    def save_pretrained(self, directory):
        own = {"unet": self.unet, "scheduler": self.inference_scheduler()}
        self.folder.export(directory, own, self.args.save_format)

    def card_data(self):
        return {
            "base_model": self.args.pretrained_model_name_or_path,
            "tags": ["stable-diffusion-xl", "text-to-image", "ppdiffusers"],
        }


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    dataset = build_dataset(args)
    warn_of_small_images(dataset, args.resolution)
    launch_training_task(SDXLTrainingModule(args), dataset, args)


if __name__ == "__main__":
    main()
