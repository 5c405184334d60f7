"""Fine-tune Stable Diffusion 3: its transformer learns your images and captions.

    python -u train_text_to_image_sd3.py --pretrained_model_name_or_path sd3 --train_data_dir photos --output_dir mine

The result is a folder for `StableDiffusion3Pipeline.from_pretrained`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

import paddle

from ppdiffusers_train.argument_parser import positive_float
from ppdiffusers_train.data.buckets import bucket_sizes, nearest_bucket
from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.data.rows import warn_of_small_images
from ppdiffusers_train.data.transforms import fit, normalize_pixels
from ppdiffusers_train.errors import BadSampleError, UserError, one_line_errors
from ppdiffusers_train.models.attention import announce_joint_attention
from ppdiffusers_train.models.drawing import draw
from ppdiffusers_train.models.recompute import enable_block_recompute
from ppdiffusers_train.models.sd3 import SD3Folder, encode_prompts, freeze_unpublished_biases
from ppdiffusers_train.models.stable_diffusion import encode_images
from ppdiffusers_train.models.text import count_tokens, tokenize
from ppdiffusers_train.models.weights import load_in_place, save_model
from ppdiffusers_train.module import DiffusionTrainingModule, freeze
from ppdiffusers_train.objectives.flow_matching import (
    bell_weights,
    interpolate,
    shifted_sigmas,
    timestep_density,
    velocity,
)
from ppdiffusers_train.objectives.losses import mse_loss
from ppdiffusers_train.training import check_run, launch_training_task

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
INPUT_IDS = ("input_ids", "input_ids_2", "input_ids_3")


def build_parser():
    parser = arguments.ArgumentParser(description=__doc__.splitlines()[0])
    group = arguments.add_pipeline_arguments(parser)
    group.add_argument(
        "--t5", action=arguments.Flag, default=True, help="the third text encoder; --no_t5: as in inference without it"
    )
    arguments.add_image_arguments(parser)
    arguments.add_data_arguments(parser)
    arguments.add_training_arguments(parser)
    add_flow_matching_arguments(parser)
    arguments.add_output_arguments(parser, output_dir="sd3-model-finetuned")
    arguments.add_validation_arguments(parser, num_validation_images=4, validation_epochs=1)
    arguments.add_reporting_arguments(parser)
    parser.set_defaults(resolution=1024, encoded_cache=True)
    return parser


def add_flow_matching_arguments(parser):
    """Which timesteps are drawn, and how they count."""
    group = parser.add_argument_group("flow matching")
    add = group.add_argument
    add(
        "--weighting_scheme", choices=("uniform", "logit-normal", "mode", "bell"), default="logit-normal",
        help="density of the timesteps; bell: uniform, with losses that count most in the middle",
        type=lambda name: name.replace("_", "-"),
    )  # fmt: skip
    add("--logit_mean", type=float, default=0.0, help="of logit-normal; above 0 prefers noise")
    add("--logit_std", type=float, default=1.0, help="of logit-normal")
    add("--mode_scale", type=float, default=1.29, help="of mode; above 0 prefers the middle")
    add("--shift", type=positive_float, help="of timesteps towards noise; default: the scheduler's")
    add("--min_timestep_boundary", type=float, default=0.0, help="train from this share of the way from noise to image")
    add("--max_timestep_boundary", type=float, default=1.0, help="train up to this share of it")
    arguments.add_empty_prompts_argument(group)


class SD3TrainingModule(DiffusionTrainingModule):
    """The transformer learns the velocity from an image's latents to noise, given the caption."""

    keep_float32_in_fp16 = ("text_encoder_3",)  # T5's activations are known to outgrow float16

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.folder = SD3Folder(
            args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path,
            "--pretrained_model_name_or_path", args.cache_dir, args.revision, args.variant, weights=not args.dry_run,
            t5=args.t5,
        )  # fmt: skip
        self.folder.check_resolution(args.resolution)
        self.read_schedule()
        count = 3 if args.t5 else 2
        self.tokenizers = [self.folder.load(name) for name in TOKENIZERS[:count]]
        self.tokenizer = self.tokenizers[0]
        self.text_length = self.tokenizer.model_max_length  # of all three, as in the pipeline
        self.check_prompts()
        self.encoders = ("vae", *TEXT_ENCODERS[:count])
        for name in TEXT_ENCODERS:
            setattr(self, name, freeze(self.folder.load(name)) if name in self.encoders else None)
        self.vae = freeze(self.folder.load("vae"))
        self.transformer = self.folder.load("transformer")
        freeze_unpublished_biases(self.transformer)
        if args.gradient_checkpointing:
            enable_block_recompute(self.transformer.transformer_blocks)
        if args.enable_xformers_memory_efficient_attention:
            announce_joint_attention()

    def read_schedule(self):
        """The table of timesteps, how often each is drawn, and how much its loss counts."""
        args, scheduler = self.args, self.folder.load("scheduler")
        if args.shift:
            scheduler = type(scheduler).from_config(scheduler.config, shift=args.shift)
        self.scheduler, count = scheduler, scheduler.config.num_train_timesteps
        sigmas = shifted_sigmas(count, scheduler.config.shift)
        bell = args.weighting_scheme == "bell"
        try:
            self.density = timestep_density(
                "uniform" if bell else args.weighting_scheme, count, args.min_timestep_boundary,
                args.max_timestep_boundary, args.logit_mean, args.logit_std, args.mode_scale,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"--{error}") from error
        self.sigmas = paddle.to_tensor(sigmas)
        self.weights = paddle.to_tensor(bell_weights(count * sigmas, count)) if bell else None

    def check_prompts(self):
        """Refuse prompts that ppdiffusers' pipeline (0.29.0) would cut: it fails when it looks for what is cut."""
        for prompt in self.args.validation_prompts or ():
            longest, limit = max(count_tokens(tokenizer, prompt) for tokenizer in self.tokenizers), self.text_length
            if longest >= limit:
                raise UserError(f"--validation_prompts: {prompt[:40]!r}… has {longest} tokens; expected below {limit}")

    @property
    def buckets(self):
        return bucket_sizes(self.args.resolution) if self.args.aspect_ratio_buckets else ()

    def preprocess(self, row, draws):
        """pixel_values [3, H, W]; input_ids, input_ids_2, and with T5 input_ids_3 [L]."""
        args, image, caption = self.args, row["image"], row["caption"]
        if args.min_image_size and min(image.size) < args.min_image_size:
            size = "{} x {}".format(*image.size)
            raise BadSampleError(f"{row['name']}: {size} pixels, --min_image_size is {args.min_image_size}")
        sizes = self.buckets or [(args.resolution, args.resolution)]
        size = sizes[nearest_bucket(sizes, *image.size)]
        image, *_ = fit(image, *size, draws, args.image_interpolation_mode, args.center_crop, args.random_flip)
        if draws.happens("drop_caption", args.proportion_empty_prompts):
            caption = ""
        ids = {
            name: tokenize(tokenizer, caption, self.text_length)[0]
            for name, tokenizer in zip(INPUT_IDS, self.tokenizers)
        }
        return {"pixel_values": normalize_pixels(image), **ids}

    def encoding_settings(self):
        names = ["resolution", "center_crop", "random_flip", "image_interpolation_mode", "proportion_empty_prompts"]
        return {
            **{name: getattr(self.args, name) for name in [*names, "min_image_size", "t5"]},
            "buckets": self.buckets,
            "scale": [self.vae.config.scaling_factor, self.vae.config.shift_factor],
            "tokenizers": [tokenizer.get_vocab() for tokenizer in self.tokenizers],
        }

    def encode(self, batch):
        """latents [B, C, h, w], shifted and scaled; prompt_embeds [B, 2L, D]; pooled_prompt_embeds [B, P]."""
        models, ids = (getattr(self, name) for name in TEXT_ENCODERS), (batch.get(name) for name in INPUT_IDS)
        embeds, pooled = encode_prompts(*models, *ids, self.transformer.config.joint_attention_dim)
        latents = encode_images(self.vae, batch["pixel_values"])
        return {"latents": latents, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def forward(self, encoded, draws):
        latents = encoded["latents"]
        noise = draws.normal("noise", latents.shape[1:])
        steps = draws.categorical("timesteps", self.density)
        sigmas = self.sigmas[steps]
        prediction = self.transformer(
            interpolate(latents, noise, sigmas),
            encoder_hidden_states=encoded["prompt_embeds"],
            pooled_projections=encoded["pooled_prompt_embeds"],
            timestep=sigmas * len(self.sigmas),
        ).sample
        weights = None if self.weights is None else self.weights[steps]
        return mse_loss(prediction, velocity(latents, noise), weights)

    def generate(self, prompts, seeds):
        own = {name: getattr(self, name) for name in ("transformer", "vae", "scheduler", *self.encoders)}
        return draw(
            self.folder.pipeline(**own), prompts, seeds, self.args.resolution, self.args.validation_inference_steps
        )

    def save_weights(self, directory):
        save_model(self.transformer, f"{directory}/transformer")

    def load_weights(self, directory):
        load_in_place(self.transformer, f"{directory}/transformer")

    def save_pretrained(self, directory):
        own = {"transformer": self.transformer, "scheduler": self.scheduler}
        self.folder.export(directory, own, self.args.save_format)

    def card_data(self):
        return {
            "base_model": self.args.pretrained_model_name_or_path,
            "tags": ["stable-diffusion-3", "text-to-image", "ppdiffusers"],
        }


@one_line_errors
def main(argv=None):
    args = build_parser().parse_args(argv)
    check_run(args)
    dataset = build_dataset(args)
    warn_of_small_images(dataset, args.resolution)
    launch_training_task(SD3TrainingModule(args), dataset, args)


if __name__ == "__main__":
    main()
