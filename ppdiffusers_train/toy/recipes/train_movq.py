"""Train the toy's MoVQ on photographs; its weights are shipped as `weights/movq.safetensors`.

    python -m ppdiffusers_train.toy.recipes.train_movq --train_data_dir examples/data/photos --seed 0

The autoencoder is used in two ways: unquantised by the Kandinsky decoder, with latents of about unit scale, and through
its codebook (van den Oord et al. 2017, arXiv 1711.00937). So half of each batch passes through the codebook.
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import paddle
from PIL import Image

from ppdiffusers_train.arguments import (
    ArgumentParser,
    add_data_arguments,
    add_output_arguments,
    add_reporting_arguments,
    add_training_arguments,
    add_validation_arguments,
)
from ppdiffusers_train.data.transforms import normalize_pixels
from ppdiffusers_train.job import job_main
from ppdiffusers_train.models.weights import load_in_place, save_model
from ppdiffusers_train.module import DiffusionTrainingModule
from ppdiffusers_train.objectives.losses import mse_loss
from ppdiffusers_train.toy.models.movq import build_movq
from ppdiffusers_train.toy.models.shipped import write_weights


def build_parser():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_training_arguments(parser, weight_decay=0.0, train_batch_size=4)
    add_output_arguments(parser, output_dir="outputs/movq")
    add_validation_arguments(parser)
    add_reporting_arguments(parser)
    parser.set_defaults(
        resolution=64, learning_rate=2e-3, lr_scheduler="cosine", lr_warmup_steps=50, max_train_steps=2000
    )
    return parser


class MoVQTrainingModule(DiffusionTrainingModule):
    """Trains all of a MoVQ to reconstruct crops of photographs."""

    shipped_as = "movq.safetensors"

    def __init__(self, args):
        super().__init__()
        self.resolution = args.resolution
        paddle.seed(args.seed or 0)
        self.movq = build_movq()

    def preprocess(self, row, draws):
        """A random square crop of half to the whole short side, flipped or not: pixel_values [3, R, R]."""
        image = row["image"]
        side = int(min(image.size) * draws.uniform("crop_size", 0.5, 1.0))
        left = int(draws.integers("crop_left", 0, image.width - side + 1))
        top = int(draws.integers("crop_top", 0, image.height - side + 1))
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC, reducing_gap=1)
        if draws.uniform("flip") < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"pixel_values": normalize_pixels(image)}

    def encode(self, batch):
        """Nothing is frozen: the pixels themselves."""
        return batch

    def forward(self, encoded, draws):
        """Squared error, the codebook's loss, and a penalty that keeps latents at zero mean and unit scale."""
        pixels = encoded["pixel_values"]
        latents = self.movq.encode(pixels).latents
        quantized, codebook_loss, _ = self.movq.quantize(latents)
        through_codebook = (draws.uniform("quantize") < 0.5).astype("float32").reshape([-1, 1, 1, 1])
        mixed = through_codebook * quantized + (1 - through_codebook) * latents
        reconstruction = self.movq.decoder(self.movq.post_quant_conv(mixed), mixed)
        mean, variance = latents.mean([0, 2, 3]), latents.var([0, 2, 3])
        unit_scale = (mean.square() + variance - (variance + 1e-6).log() - 1).mean()
        return mse_loss(reconstruction, pixels) + 0.1 * codebook_loss.mean() + 0.01 * unit_scale

    def save_weights(self, directory):
        save_model(self.movq, f"{directory}/movq")

    def load_weights(self, directory):
        load_in_place(self.movq, f"{directory}/movq")

    def save_pretrained(self, directory):
        """Write the model's folder, and its weights as the package ships them."""
        self.save_weights(directory)
        write_weights(f"{directory}/{self.shipped_as}", {"": self.movq})


main = job_main(build_parser, MoVQTrainingModule)

if __name__ == "__main__":
    main()
