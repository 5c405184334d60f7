"""Fine-tune Stable Diffusion XL: train its UNet on your images and captions.

    python -u train_text_to_image_sdxl.py --pretrained_model_name_or_path sdxl --train_data_dir photos --output_dir mine

The result is a folder for `StableDiffusionXLPipeline.from_pretrained`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

import numpy as np
from ppdiffusers import DDPMScheduler

from ppdiffusers_train.data.buckets import bucket_sizes, size_for
from ppdiffusers_train.data.rows import refuse_small_image, warn_of_small_images
from ppdiffusers_train.data.tags import vary_tags
from ppdiffusers_train.data.transforms import fit, fit_mask, normalize_pixels
from ppdiffusers_train.job import LatentDenoisingTraining, job_main, named_by_flags
from ppdiffusers_train.models.attention import announce_plain_attention
from ppdiffusers_train.models.generation import generate_images
from ppdiffusers_train.models.masks import encode_masks
from ppdiffusers_train.models.sdxl import SDXLFolder, encode_captions, tokenize_caption
from ppdiffusers_train.models.stable_diffusion import encode_images
from ppdiffusers_train.objectives.losses import area_weights
from ppdiffusers_train.objectives.timesteps import draw_timesteps, timestep_weights


def build_parser(doc=__doc__, save_formats=arguments.PIPELINE_FORMATS):
    parser = arguments.ArgumentParser(description=doc.splitlines()[0])
    group = arguments.add_pipeline_arguments(parser)
    no_kernel = "This flag has no effect: it is accepted for old commands, but ppdiffusers has no such kernel."
    group.add_argument("--enable_npu_flash_attention", action=arguments.Flag, help=no_kernel)
    arguments.add_prediction_arguments(group)
    arguments.add_image_arguments(parser)
    arguments.add_diffusion_arguments(parser, noise_offset=True)
    arguments.add_timestep_arguments(parser)
    arguments.add_run_arguments(
        parser, "sdxl-model-finetuned", save_formats, num_validation_images=4, validation_epochs=1
    )
    parser.set_defaults(resolution=1024, encoded_cache=True)
    return parser


class SDXLTrainingModule(LatentDenoisingTraining):
    """Trains the UNet to denoise VAE latents, conditioned on the caption, the image's size and the crop."""

    title = "SDXL"
    encoders = ("vae", "text_encoder", "text_encoder_2")
    can_compile_encode = True

    def __init__(self, args):
        super().__init__()
        self.args = args
        names = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
        where = args.cache_dir, args.revision, args.variant
        options = {"weights": not args.dry_run, "single_file_config": args.single_file_config}
        self.folder = SDXLFolder(*names, "--pretrained_model_name_or_path", *where, **options)
        self.folder.check_resolution(args.resolution)
        self.use_scheduler(self.load_scheduler(args.prediction_type, DDPMScheduler))
        with named_by_flags():
            self.timestep_weights = timestep_weights(
                args.timestep_bias_strategy, self.scheduler.config.num_train_timesteps, args.timestep_bias_multiplier,
                args.timestep_bias_portion, args.timestep_bias_begin, args.timestep_bias_end,
            )  # fmt: skip
        self.folder.check_clip_skip(args.clip_skip)
        self.tokenizer, self.tokenizer_2 = self.folder.load("tokenizer"), self.folder.load("tokenizer_2")
        for name in ("text_encoder", "text_encoder_2", "vae"):
            self.load_later(name, self.folder.later(name))
        self.unet = self.folder.load("unet")
        self.save_memory(self.unet)
        if args.enable_npu_flash_attention:
            announce_plain_attention("ppdiffusers has no kernel for NPUs", "--enable_npu_flash_attention")

    def load_scheduler(self, prediction_type, scheduler_class=None):
        return self.folder.load_scheduler(prediction_type, self.args.rescale_betas_zero_snr, scheduler_class)

    @property
    def buckets(self):
        return bucket_sizes(self.args.resolution) if self.args.aspect_ratio_buckets else ()

    def preprocess(self, row, draws):
        """pixel_values [3, H, W]; mask [1, H, W] if there is one; input_ids, input_ids_2 [L]; has_prompt [], 0 where
        the embeddings are to be zeros; time_ids [6]: height and width of the file, top and left of the crop, height and
        width of the crop."""
        args, image = self.args, row["image"]
        refuse_small_image(row, args.min_image_size)
        size = size_for(*image.size, args.resolution, self.buckets)
        crop, top, left = fit(image, *size, draws, args.image_interpolation_mode, args.center_crop, args.random_flip)
        caption = vary_tags(draws, row["caption"], args.shuffle_tags, args.keep_tags, args.tag_dropout, args.wildcards)
        is_dropped = draws.bernoulli("drop_caption", args.proportion_empty_prompts)
        how = is_dropped, self.folder.no_prompt_is_zeros, args.max_token_length // 75
        return {
            "pixel_values": normalize_pixels(crop),
            "time_ids": np.float32([image.height, image.width, top, left, *size]),
            **fit_mask(row, *size, draws, args.center_crop, args.random_flip),
            **tokenize_caption(self.tokenizer, self.tokenizer_2, caption, *how),
        }

    def encode_tokens(self, tokens):  # another name: `--to_static` and CPUs compile it, and would mix them up
        args, encoders = self.args, (self.text_encoder, self.text_encoder_2)
        return encode_captions(*encoders, tokens, args.clip_skip, args.max_token_length // 75)

    def encoding_settings(self):
        names = ["resolution", "center_crop", "random_flip", "image_interpolation_mode", "proportion_empty_prompts"]
        names += ["shuffle_tags", "keep_tags", "tag_dropout", "wildcards"]
        return {
            **{name: getattr(self.args, name) for name in [*names, "min_image_size", "clip_skip", "max_token_length"]},
            "buckets": self.buckets,
            "scaling_factor": self.folder.vae.config("vae").get("scaling_factor"),
            "no_prompt_is_zeros": self.folder.no_prompt_is_zeros,
            "tokenizers": [self.tokenizer.get_vocab(), self.tokenizer_2.get_vocab()],
        }

    def encode(self, batch):
        """latents [B, 4, h, w], scaled; prompt_embeds [B, L, D]; pooled_prompt_embeds [B, P]; time_ids [B, 6].

        Where text encoders are trained, captions stay token ids: input_ids, input_ids_2 [B, L]; has_prompt [B].
        """
        captions = {name: batch[name] for name in ("input_ids", "input_ids_2", "has_prompt")}
        if "text_encoder" in self.encoders:
            captions = self.encode_tokens(captions)
        latents = encode_images(self.vae, batch["pixel_values"])
        return {"latents": latents, **captions, "time_ids": batch["time_ids"], **encode_masks(batch, latents)}

    def inspect_dataset(self, dataset):
        warn_of_small_images(dataset, self.args.resolution)

    def forward(self, encoded, draws):
        latents = encoded["latents"]
        noise = self.draw_noise(draws, latents)
        timesteps = draw_timesteps(draws, self.scheduler.config.num_train_timesteps, self.timestep_weights)
        prediction = self.unet(
            self.add_noise(draws, latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=encoded["prompt_embeds"],
            added_cond_kwargs={"text_embeds": encoded["pooled_prompt_embeds"], "time_ids": encoded["time_ids"]},
        ).sample
        area = area_weights(encoded.get("mask"), self.args.masked_area_weight)
        return self.denoising_loss(prediction, latents, noise, timesteps, area)

    def generate(self, prompts, seeds, options=None):
        scheduler = self.load_scheduler(self.scheduler.config.prediction_type)
        own = {name: getattr(self, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
        pipeline = self.folder.pipeline(scheduler=scheduler, **own)
        args = self.args
        steps, clip_skip = args.validation_inference_steps, args.clip_skip or None
        return generate_images(pipeline, prompts, seeds, args.resolution, steps, options, clip_skip=clip_skip)

    def save_pretrained(self, directory):
        scheduler = self.load_scheduler(self.scheduler.config.prediction_type)
        self.folder.export(directory, {"unet": self.unet, "scheduler": scheduler}, self.args.save_format)

    def card_data(self):
        tags = ["stable-diffusion-xl", "text-to-image", "ppdiffusers"]
        return {"base_model": self.args.pretrained_model_name_or_path, "tags": tags}


main = job_main(build_parser, SDXLTrainingModule)

if __name__ == "__main__":
    main()
