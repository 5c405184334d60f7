"""Fine-tune Stable Diffusion 1.x or 2.x: train its UNet on your images and captions.

    python -u train_text_to_image.py --pretrained_model_name_or_path sd --train_data_dir photos --output_dir mine

The result is a folder for `StableDiffusionPipeline.from_pretrained`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

import paddle
from ppdiffusers import DDPMScheduler

from ppdiffusers_train.data.buckets import bucket_sizes, size_for
from ppdiffusers_train.data.rows import refuse_small_image, warn_of_small_images
from ppdiffusers_train.data.tags import draw_caption
from ppdiffusers_train.data.transforms import fit, fit_mask, normalize_pixels
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.job import LatentDenoisingTraining, job_main
from ppdiffusers_train.models.generation import generate_images
from ppdiffusers_train.models.masks import encode_masks
from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder, encode_images, encode_prompt
from ppdiffusers_train.models.text import tokenize_chunks
from ppdiffusers_train.objectives.denoising import rectify_noise
from ppdiffusers_train.objectives.losses import area_weights


def build_parser(doc=__doc__, save_formats=arguments.PIPELINE_FORMATS):
    parser = arguments.ArgumentParser(description=doc.splitlines()[0])
    arguments.add_prediction_arguments(arguments.add_pipeline_arguments(parser))
    arguments.add_image_arguments(parser)
    arguments.add_dream_arguments(arguments.add_diffusion_arguments(parser, noise_offset=True))
    arguments.add_run_arguments(parser, "sd-model-finetuned", save_formats, num_validation_images=4)
    return parser


class SDTrainingModule(LatentDenoisingTraining):
    """Trains the UNet to denoise VAE latents, conditioned on the caption."""

    title = "Stable Diffusion"
    encoders = ("vae", "text_encoder")
    can_compile_encode = True

    def __init__(self, args):
        super().__init__()
        self.args = args
        names = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
        where = args.cache_dir, args.revision, args.variant
        options = {"weights": not args.dry_run, "single_file_config": args.single_file_config}
        self.folder = StableDiffusionFolder(*names, "--pretrained_model_name_or_path", *where, **options)
        self.folder.check_resolution(args.resolution)
        self.folder.check_clip_skip(args.clip_skip)
        self.use_scheduler(self.load_scheduler(args.prediction_type, DDPMScheduler))
        kind = self.scheduler.config.prediction_type
        if args.dream_training and kind != "epsilon":
            raise UserError(f"--dream_training: this model predicts {kind}; expected one that predicts epsilon")
        for name in self.encoders:
            self.load_later(name, self.folder.later(name))
        self.tokenizer, self.unet = self.folder.load("tokenizer"), self.folder.load("unet")
        self.save_memory(self.unet)

    def load_scheduler(self, prediction_type, scheduler_class=None):
        return self.folder.load_scheduler(prediction_type, self.args.rescale_betas_zero_snr, scheduler_class)

    @property
    def buckets(self):
        return bucket_sizes(self.args.resolution) if self.args.aspect_ratio_buckets else ()

    def preprocess(self, row, draws):
        """pixel_values [3, H, W]; mask [1, H, W] if there is one; input_ids [L], of an empty text if it is dropped."""
        args, image = self.args, row["image"]
        refuse_small_image(row, args.min_image_size)
        size = size_for(*image.size, args.resolution, self.buckets)
        image, *_ = fit(image, *size, draws, args.image_interpolation_mode, args.center_crop, args.random_flip)
        mask = fit_mask(row, *size, draws, args.center_crop, args.random_flip)
        how = args.proportion_empty_prompts, args.shuffle_tags, args.keep_tags, args.tag_dropout, args.wildcards
        caption = draw_caption(draws, row["caption"], *how)
        return {"pixel_values": normalize_pixels(image), "input_ids": self.tokenize(caption), **mask}

    def tokenize(self, caption):
        return tokenize_chunks(self.tokenizer, caption, self.args.max_token_length // 75)

    def encode_prompt(self, input_ids):
        chunks = self.args.max_token_length // 75
        return encode_prompt(self.text_encoder, input_ids, self.args.clip_skip, chunks)

    def encoding_settings(self):
        names = ["resolution", "image_interpolation_mode", "center_crop", "random_flip", "proportion_empty_prompts"]
        names += ["shuffle_tags", "keep_tags", "tag_dropout", "wildcards"]
        return {
            **{name: getattr(self.args, name) for name in [*names, "min_image_size", "clip_skip", "max_token_length"]},
            "buckets": self.buckets,
            "scaling_factor": self.folder.vae.config("vae").get("scaling_factor"),
            "tokenizer": self.tokenizer.get_vocab(),
        }

    def encode(self, batch):
        """latents [B, 4, h, w], scaled; prompt_embeds [B, L, D]."""
        latents = encode_images(self.vae, batch["pixel_values"])
        embeds = self.encode_prompt(batch["input_ids"])
        return {"latents": latents, "prompt_embeds": embeds, **encode_masks(batch, latents)}

    def inspect_dataset(self, dataset):
        warn_of_small_images(dataset, self.args.resolution)

    def forward(self, encoded, draws):
        args, latents, prompt_embeds = self.args, encoded["latents"], encoded["prompt_embeds"]
        schedule = self.scheduler.alphas_cumprod
        noise = self.draw_noise(draws, latents)
        timesteps = draws.integers("timesteps", 0, len(schedule))
        noisy = self.add_noise(draws, latents, noise, timesteps)
        if args.dream_training:
            with paddle.no_grad():
                own = self.unet(noisy, timesteps, prompt_embeds).sample
            noisy, noise = rectify_noise(schedule, noisy, noise, timesteps, own, args.dream_detail_preservation)
        prediction = self.unet(noisy, timesteps, prompt_embeds).sample
        area = area_weights(encoded.get("mask"), args.masked_area_weight)
        return self.denoising_loss(prediction, latents, noise, timesteps, area)

    def generate(self, prompts, seeds, options=None):
        scheduler = self.load_scheduler(self.scheduler.config.prediction_type)
        own = {name: getattr(self, name) for name in ("unet", "vae", "text_encoder")}
        pipeline = self.folder.pipeline(scheduler=scheduler, **own)
        args = self.args
        steps, clip_skip = args.validation_inference_steps, args.clip_skip or None
        return generate_images(pipeline, prompts, seeds, args.resolution, steps, options, clip_skip=clip_skip)

    def save_pretrained(self, directory):
        scheduler = self.load_scheduler(self.scheduler.config.prediction_type)
        self.folder.export(directory, {"unet": self.unet, "scheduler": scheduler}, self.args.save_format)

    def card_data(self):
        kind = {"tags": ["stable-diffusion", "text-to-image", "ppdiffusers"]}
        return kind | {"base_model": self.args.pretrained_model_name_or_path}


main = job_main(build_parser, SDTrainingModule)

if __name__ == "__main__":
    main()
