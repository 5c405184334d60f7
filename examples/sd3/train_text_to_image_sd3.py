"""Fine-tune Stable Diffusion 3: train its transformer on your images and captions.

    python -u train_text_to_image_sd3.py --pretrained_model_name_or_path sd3 --train_data_dir photos --output_dir mine

The result is a folder for `StableDiffusion3Pipeline.from_pretrained`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

import paddle

from ppdiffusers_train.data.buckets import bucket_sizes, size_for
from ppdiffusers_train.data.rows import refuse_small_image, warn_of_small_images
from ppdiffusers_train.data.tags import draw_caption
from ppdiffusers_train.data.transforms import fit, fit_mask, normalize_pixels
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.job import FullTraining, job_main, named_by_flags
from ppdiffusers_train.models.attention import announce_joint_attention
from ppdiffusers_train.models.attention_slices import enable_sliced_attention
from ppdiffusers_train.models.generation import generate_images
from ppdiffusers_train.models.masks import encode_masks
from ppdiffusers_train.models.recompute import enable_recompute
from ppdiffusers_train.models.sd3 import SD3Folder, check_prompts, encode_captions, tokenize_caption
from ppdiffusers_train.models.stable_diffusion import encode_images
from ppdiffusers_train.objectives.denoising import perturb_noise
from ppdiffusers_train.objectives.flow_matching import interpolate, shifted_sigmas, timestep_weighting, velocity
from ppdiffusers_train.objectives.losses import area_weights, mse_loss


def build_parser(doc=__doc__, save_formats=arguments.PIPELINE_FORMATS):
    parser = arguments.ArgumentParser(description=doc.splitlines()[0])
    group = arguments.add_pipeline_arguments(parser)
    group.add_argument(
        "--t5",
        action=arguments.Flag,
        default=True,
        help="Use the third text encoder; --no_t5 trains for inference without it.",
    )
    group.add_argument(
        "--max_sequence_length", type=arguments.positive_int, metavar="N",
        help="Read captions of up to N tokens with T5; without it, as many as CLIP reads, 77.",
    )  # fmt: skip
    arguments.add_image_arguments(parser)
    arguments.add_flow_matching_arguments(parser)
    arguments.add_run_arguments(
        parser, "sd3-model-finetuned", save_formats, num_validation_images=4, validation_epochs=1
    )
    parser.set_defaults(resolution=1024, encoded_cache=True)
    return parser


class SD3TrainingModule(FullTraining):
    """Trains the transformer to predict the velocity from an image's latents to noise, conditioned on the caption."""

    title = "Stable Diffusion 3"
    trained = "transformer"
    keep_float32_in_fp16 = ("text_encoder_3",)  # T5's activations overflow in float16

    def __init__(self, args):
        super().__init__()
        self.args = args
        names = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
        options = {"revision": args.revision, "variant": args.variant, "weights": not args.dry_run, "t5": args.t5}
        options["single_file_config"] = args.single_file_config
        self.folder = SD3Folder(*names, "--pretrained_model_name_or_path", cache_dir=args.cache_dir, **options)
        self.folder.check_resolution(args.resolution)
        self.scheduler = self.folder.load_scheduler(args.shift)
        count, shift = self.scheduler.config.num_train_timesteps, self.scheduler.config.shift
        self.sigmas = paddle.to_tensor(shifted_sigmas(count, shift))
        with named_by_flags():
            self.density, self.weights = timestep_weighting(
                args.weighting_scheme, self.sigmas.numpy(), args.min_timestep_boundary, args.max_timestep_boundary,
                args.logit_mean, args.logit_std, args.mode_scale,
            )  # fmt: skip
        for name in self.folder.tokenizers:
            setattr(self, name, self.folder.load(name))
        if args.max_sequence_length and not args.t5:
            raise UserError("--max_sequence_length: is the length of T5's input, and there is --no_t5 as well")
        check_prompts(args.validation_prompts, self.tokenizers)
        self.encoders = ("vae", *self.folder.text_encoders)
        for name in (*self.folder.text_encoders, "vae"):
            self.load_later(name, self.folder.later(name))
        self.transformer = self.folder.load("transformer")
        if args.gradient_checkpointing:
            enable_recompute(self.transformer)
        if args.enable_xformers_memory_efficient_attention:
            announce_joint_attention()
        if args.attention_slices == "auto":
            enable_sliced_attention(self.transformer)

    @property
    def tokenizers(self):
        return [getattr(self, name) for name in self.folder.tokenizers]

    @property
    def buckets(self):
        return bucket_sizes(self.args.resolution) if self.args.aspect_ratio_buckets else ()

    def preprocess(self, row, draws):
        """pixel_values [3, H, W]; mask [1, H, W] if there is one; input_ids, input_ids_2, with T5 input_ids_3 [L]."""
        args, image = self.args, row["image"]
        refuse_small_image(row, args.min_image_size)
        size = size_for(*image.size, args.resolution, self.buckets)
        image, *_ = fit(image, *size, draws, args.image_interpolation_mode, args.center_crop, args.random_flip)
        how = args.proportion_empty_prompts, args.shuffle_tags, args.keep_tags, args.tag_dropout, args.wildcards
        caption = draw_caption(draws, row["caption"], *how)
        return {
            "pixel_values": normalize_pixels(image),
            **fit_mask(row, *size, draws, args.center_crop, args.random_flip),
            **self.tokenize(caption),
        }

    def tokenize(self, caption):
        return tokenize_caption(self.tokenizers, caption, self.args.max_sequence_length)

    def encoding_settings(self):
        names = ["resolution", "center_crop", "random_flip", "image_interpolation_mode", "proportion_empty_prompts"]
        names += ["shuffle_tags", "keep_tags", "tag_dropout", "wildcards"]
        return {
            **{name: getattr(self.args, name) for name in [*names, "min_image_size", "t5", "max_sequence_length"]},
            "buckets": self.buckets,
            "scale": [self.folder.vae.config("vae").get(name) for name in ("scaling_factor", "shift_factor")],
            "tokenizers": [tokenizer.get_vocab() for tokenizer in self.tokenizers],
        }

    def encode(self, batch):
        """latents [B, C, h, w], shifted and scaled; prompt_embeds [B, 2L, D]; pooled_prompt_embeds [B, P]."""
        encoders = [getattr(self, name) for name in self.folder.text_encoders]
        captions = encode_captions(encoders, batch, self.transformer.config.joint_attention_dim)
        latents = encode_images(self.vae, batch["pixel_values"])
        return {"latents": latents, **captions, **encode_masks(batch, latents)}

    def inspect_dataset(self, dataset):
        warn_of_small_images(dataset, self.args.resolution)

    def forward(self, encoded, draws):
        latents = encoded["latents"]
        noise = draws.normal("noise", latents.shape[1:])
        steps = draws.categorical("timesteps", self.density)
        sigmas = self.sigmas[steps]
        prediction = self.transformer(
            interpolate(latents, perturb_noise(draws, noise, self.args.input_perturbation), sigmas),
            encoder_hidden_states=encoded["prompt_embeds"],
            pooled_projections=encoded["pooled_prompt_embeds"],
            timestep=sigmas * len(self.sigmas),
        ).sample
        weights = None if self.weights is None else self.weights[steps]
        area = area_weights(encoded.get("mask"), self.args.masked_area_weight)
        return mse_loss(prediction, velocity(latents, noise), weights, area)

    def generate(self, prompts, seeds, options=None):
        own = {name: getattr(self, name) for name in ("transformer", "vae", "scheduler", *self.encoders)}
        pipeline = self.folder.pipeline(**own)
        args = self.args
        return generate_images(pipeline, prompts, seeds, args.resolution, args.validation_inference_steps, options)

    def save_pretrained(self, directory):
        own = {"transformer": self.transformer, "scheduler": self.scheduler}
        self.folder.export(directory, own, self.args.save_format)

    def card_data(self):
        tags = ["stable-diffusion-3", "text-to-image", "ppdiffusers"]
        return {"base_model": self.args.pretrained_model_name_or_path, "tags": tags}


main = job_main(build_parser, SD3TrainingModule)

if __name__ == "__main__":
    main()
