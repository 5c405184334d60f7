"""Train the decoder of a Stable Diffusion's VAE on your images. docs/en/your-own-job.md explains it.

    python -u train_vae_decoder.py --pretrained_model_name_or_path sd --train_data_dir photos --output_dir mine

The result is a folder for `StableDiffusionPipeline.from_pretrained`, with the same latents and another decoder.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

from ppdiffusers_train.data.transforms import fit, normalize_pixels
from ppdiffusers_train.job import FullTraining, job_main
from ppdiffusers_train.models.generation import generate_images
from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder
from ppdiffusers_train.module import freeze
from ppdiffusers_train.objectives.losses import mse_loss


def build_parser():
    parser = arguments.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_pipeline_arguments(parser)
    arguments.add_crop_arguments(parser)
    arguments.add_run_arguments(parser, "vae", arguments.PIPELINE_FORMATS, train_batch_size=1, learning_rate=1e-5)
    return parser


class VAEDecoderTrainingModule(FullTraining):
    """Trains the decoder to restore an image from a random sample of its latents; the encoder stays as it is."""

    title, trained, encoders = "VAE decoder", "vae", ("encoder",)

    def __init__(self, args):
        super().__init__()
        self.args = args
        names = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
        where = args.cache_dir, args.revision, args.variant
        options = {"weights": not args.dry_run, "single_file_config": args.single_file_config}
        self.folder = StableDiffusionFolder(*names, "--pretrained_model_name_or_path", *where, **options)
        self.folder.check_resolution(args.resolution)
        self.load_later("encoder", self.folder.later("vae"))
        self.vae = self.folder.load("vae")
        self.save_memory(self.vae)
        for part in (self.vae.encoder, self.vae.quant_conv):
            freeze(part)

    def preprocess(self, row, draws):
        """pixel_values [3, R, R] in [-1, 1]."""
        size, args = self.args.resolution, self.args
        image, *_ = fit(row["image"], size, size, draws, "lanczos", args.center_crop, args.random_flip)
        return {"pixel_values": normalize_pixels(image)}

    def encoding_settings(self):
        return {name: getattr(self.args, name) for name in ("resolution", "center_crop", "random_flip")}

    def encode(self, batch):
        """mean, deviation [B, 4, r, r] of the latents; pixel_values [B, 3, R, R]."""
        latents = self.encoder.encode(batch["pixel_values"]).latent_dist
        return {"mean": latents.mean, "deviation": latents.std, **batch}

    def forward(self, encoded, draws):
        mean = encoded["mean"]
        latents = mean + encoded["deviation"] * draws.normal("latents", mean.shape[1:])
        return mse_loss(self.vae.decode(latents).sample, encoded["pixel_values"])

    def generate(self, prompts, seeds):
        pipeline = self.folder.pipeline(vae=self.vae)
        return generate_images(pipeline, prompts, seeds, self.args.resolution, self.args.validation_inference_steps)

    def save_pretrained(self, directory):
        self.folder.export(directory, {"vae": self.vae}, self.args.save_format)

    def card_data(self):
        return {"base_model": self.args.pretrained_model_name_or_path, "tags": ["stable-diffusion", "vae"]}


main = job_main(build_parser, VAEDecoderTrainingModule)

if __name__ == "__main__":
    main()
