"""Fine-tune the decoder of Kandinsky 2.2: the UNet that generates an image from its CLIP embedding.

    python -u train_text_to_image_decoder.py --train_data_dir photos --resolution 512 --output_dir my-decoder

The result is a folder for `KandinskyV22CombinedPipeline.from_pretrained`, with the decoder's and the prior's parts.
"""

import ppdiffusers_train  # noqa: F401  (before paddle: prepares the processor)
from ppdiffusers_train import arguments

import numpy as np
from PIL import Image
from ppdiffusers import DDPMScheduler, UNet2DConditionModel, VQModel
from ppdiffusers.transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from ppdiffusers_train.data.transforms import center_crop_square, normalize_pixels, square_mask, without_ends
from ppdiffusers_train.job import LatentDenoisingTraining, job_main
from ppdiffusers_train.models.kandinsky2_2 import KandinskyFolders, WithImageEmbeddings
from ppdiffusers_train.models.masks import encode_masks
from ppdiffusers_train.objectives.losses import area_weights


def build_parser(doc=__doc__):
    parser = arguments.ArgumentParser(description=doc.splitlines()[0])
    arguments.add_kandinsky_arguments(parser)
    arguments.add_mask_arguments(arguments.add_diffusion_arguments(parser, noise_offset=True, captions=False))
    arguments.add_run_arguments(parser, "kandi_2_2-model-finetuned", train_batch_size=1, adam_weight_decay=0.0)
    return parser


class KandinskyDecoderTrainingModule(WithImageEmbeddings, LatentDenoisingTraining):
    """Trains the UNet to denoise MoVQ latents, conditioned on the CLIP embedding of the same image."""

    title = "Kandinsky 2.2 decoder"
    encoders = ("movq", "image_encoder")
    can_compile_encode = True

    def __init__(self, args):
        super().__init__()
        self.args = args
        names = args.pretrained_decoder_model_name_or_path, args.pretrained_prior_model_name_or_path
        self.folders = KandinskyFolders(*names, args.cache_dir, args.variant, weights=not args.dry_run)
        self.folders.check_resolution(args.resolution)
        decoder, prior = self.folders.decoder, self.folders.prior
        self.image_processor = prior.load("image_processor", CLIPImageProcessor)
        self.load_later("image_encoder", prior.later("image_encoder", CLIPVisionModelWithProjection))
        self.load_later("movq", decoder.later("movq", VQModel))
        self.unet = decoder.load("unet", UNet2DConditionModel)
        self.use_scheduler(decoder.load("scheduler", DDPMScheduler))
        self.save_memory(self.unet)

    def preprocess(self, row, draws):
        """pixel_values [3, R, R] of the centred square; clip_pixel_values of the whole image, as CLIP crops it."""
        image, resolution = row["image"], self.args.resolution
        square = center_crop_square(image).resize((resolution, resolution), Image.Resampling.BICUBIC, reducing_gap=1)
        clip_pixels = self.image_processor(without_ends(image), return_tensors="np").pixel_values[0]
        if draws.bernoulli("drop_caption", self.args.proportion_empty_prompts):
            clip_pixels = np.zeros_like(clip_pixels)  # guidance uses the embedding of zeros for no image
        pixels = {"pixel_values": normalize_pixels(square), "clip_pixel_values": clip_pixels}
        return {**pixels, **square_mask(row, resolution)}

    def encoding_settings(self):
        return {
            "resolution": self.args.resolution,
            "image_processor": self.image_processor.to_dict(),
            "proportion_empty_prompts": self.args.proportion_empty_prompts,
        }

    def encode(self, batch):
        """latents [B, 4, r, r], unquantised and unscaled; image_embeds [B, D]."""
        latents = self.movq.encode(batch["pixel_values"]).latents
        return {
            "latents": latents,
            **encode_masks(batch, latents),
            "image_embeds": self.embed_image(batch["clip_pixel_values"]),
        }

    def forward(self, encoded, draws):
        latents = encoded["latents"]
        noise = self.draw_noise(draws, latents)
        timesteps = draws.integers("timesteps", 0, self.scheduler.config.num_train_timesteps)
        prediction = self.unet(
            self.add_noise(draws, latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=None,
            added_cond_kwargs={"image_embeds": encoded["image_embeds"]},
        ).sample
        area = area_weights(encoded.get("mask"), self.args.masked_area_weight)
        # The other half of the channels predicts the variance, which no loss here trains.
        return self.denoising_loss(prediction[:, : latents.shape[1]], latents, noise, timesteps, area)

    def generate(self, prompts, seeds, options=None):
        own = {"unet": self.unet, "movq": self.movq}
        own |= {f"prior_{name}": getattr(self, name) for name in ("image_encoder", "image_processor")}
        how = self.args.resolution, self.args.validation_inference_steps, options
        return self.folders.generate(own, prompts, seeds, *how)

    def save_pretrained(self, directory):
        self.folders.export_combined(directory, own={"unet": self.unet}, save_format=self.args.save_format)

    def card_data(self):
        return {
            "base_model": self.args.pretrained_decoder_model_name_or_path,
            "prior": [self.args.pretrained_prior_model_name_or_path],
            "tags": ["kandinsky", "text-to-image", "ppdiffusers"],
        }


main = job_main(build_parser, KandinskyDecoderTrainingModule)

if __name__ == "__main__":
    main()
