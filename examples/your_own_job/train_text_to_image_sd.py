"""Fine-tune Stable Diffusion 1.5: train its UNet on your images and captions. docs/en/your-own-job.md explains it.

    python -u train_text_to_image_sd.py --pretrained_model_name_or_path sd --train_data_dir photos --output_dir mine

The result is a folder for `StableDiffusionPipeline.from_pretrained`.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

from ppdiffusers import DDPMScheduler

from ppdiffusers_train.data.transforms import fit, normalize_pixels
from ppdiffusers_train.job import FullTraining, job_main
from ppdiffusers_train.models.generation import generate_images
from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder, encode_images, encode_prompt
from ppdiffusers_train.models.text import tokenize
from ppdiffusers_train.models.unet import save_memory
from ppdiffusers_train.objectives.denoising import denoising_loss, draw_noise
from ppdiffusers_train.objectives.noise_schedule import add_noise


def build_parser():
    parser = arguments.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_pipeline_arguments(parser)
    add = arguments.add_crop_arguments(parser).add_argument
    modes, resize = arguments.INTERPOLATION_MODES, "Resize images with this interpolation."
    add("--image_interpolation_mode", choices=modes, default="lanczos", help=resize)
    arguments.add_data_arguments(parser)
    arguments.add_training_arguments(parser)
    arguments.add_diffusion_arguments(parser, noise_offset=True)
    arguments.add_output_arguments(parser, "sd-model-finetuned", arguments.PIPELINE_FORMATS)
    arguments.add_validation_arguments(parser, num_validation_images=4, validation_epochs=1)
    arguments.add_reporting_arguments(parser)
    return parser


class SDTrainingModule(FullTraining):
    """Trains the UNet to denoise VAE latents, conditioned on the caption."""

    title = "Stable Diffusion"
    encoders = ("vae", "text_encoder")

    def __init__(self, args):
        super().__init__()
        self.args = args
        names = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
        where = args.cache_dir, args.revision, args.variant
        options = {"weights": not args.dry_run, "single_file_config": args.single_file_config}
        self.folder = StableDiffusionFolder(*names, "--pretrained_model_name_or_path", *where, **options)
        self.folder.check_resolution(args.resolution)
        self.scheduler = self.folder.load("scheduler", DDPMScheduler)
        for name in self.encoders:
            self.load_later(name, self.folder.later(name))
        self.tokenizer, self.unet = self.folder.load("tokenizer"), self.folder.load("unet")
        save_memory(self.unet, args.gradient_checkpointing, args.enable_xformers_memory_efficient_attention)

    def preprocess(self, row, draws):
        """pixel_values [3, R, R]; input_ids [L]."""
        args, size, image, caption = self.args, self.args.resolution, row["image"], row["caption"]
        image, *_ = fit(image, size, size, draws, args.image_interpolation_mode, args.center_crop, args.random_flip)
        if draws.bernoulli("drop_caption", args.proportion_empty_prompts):
            caption = ""
        return {"pixel_values": normalize_pixels(image), "input_ids": tokenize(self.tokenizer, caption)[0]}

    def encoding_settings(self):
        names = ("resolution", "image_interpolation_mode", "center_crop", "random_flip", "proportion_empty_prompts")
        settings = {name: getattr(self.args, name) for name in names}
        return {
            **settings,
            "scale": self.folder.vae.config("vae").get("scaling_factor"),
            "tokenizer": self.tokenizer.get_vocab(),
        }

    def encode(self, batch):
        """latents [B, 4, r, r], scaled; prompt_embeds [B, L, D]."""
        latents = encode_images(self.vae, batch["pixel_values"])
        return {"latents": latents, "prompt_embeds": encode_prompt(self.text_encoder, batch["input_ids"])}

    def forward(self, encoded, draws):
        latents, prompt_embeds = encoded["latents"], encoded["prompt_embeds"]
        schedule, kind = self.scheduler.alphas_cumprod, self.scheduler.config.prediction_type
        noise = draw_noise(draws, latents.shape[1:], self.args.noise_offset)
        timesteps = draws.integers("timesteps", 0, len(schedule))
        prediction = self.unet(add_noise(schedule, latents, noise, timesteps), timesteps, prompt_embeds).sample
        return denoising_loss(prediction, kind, schedule, latents, noise, timesteps, self.args.snr_gamma)

    def generate(self, prompts, seeds):
        pipeline = self.folder.pipeline(unet=self.unet, vae=self.vae, text_encoder=self.text_encoder)
        return generate_images(pipeline, prompts, seeds, self.args.resolution, self.args.validation_inference_steps)

    def save_pretrained(self, directory):
        self.folder.export(directory, {"unet": self.unet}, self.args.save_format)

    def card_data(self):
        return {"base_model": self.args.pretrained_model_name_or_path, "tags": ["stable-diffusion", "text-to-image"]}


main = job_main(build_parser, SDTrainingModule)

if __name__ == "__main__":
    main()
