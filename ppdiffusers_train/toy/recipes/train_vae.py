"""Train the shapes' VAE; its weights are shipped as `weights/vae.safetensors`.

    python -m ppdiffusers_train.toy.recipes.train_vae

A variational autoencoder (Kingma and Welling 2013, arXiv 1312.6114) whose prior has a small weight, which only keeps
latents centred and close together (Rombach et al. 2021, arXiv 2112.10752, section 3.1).
"""

import ppdiffusers_train  # noqa: F401  (before paddle)

import numpy as np
import paddle

from ppdiffusers_train.data.transforms import normalize_pixels
from ppdiffusers_train.job import job_main
from ppdiffusers_train.models.weights import load_in_place, save_model
from ppdiffusers_train.module import DiffusionTrainingModule
from ppdiffusers_train.objectives.losses import mse_loss
from ppdiffusers_train.toy.models.shipped import load_weights, write_weights
from ppdiffusers_train.toy.models.vae import LATENT_STD, build_vae
from ppdiffusers_train.toy.recipes import recipe
from ppdiffusers_train.toy.world.shapes_dataset import ShapesDataset

PRIOR_WEIGHT = 1e-3
MEASURED_PICTURES = 500


def build_parser():
    return recipe.build_parser(
        __doc__.splitlines()[0], "outputs/vae", train_batch_size=16, learning_rate=3e-3, max_train_steps=1250
    )


class VAETrainingModule(DiffusionTrainingModule):
    """Trains all of a VAE to reconstruct pictures of shapes."""

    def __init__(self, args):
        super().__init__()
        paddle.seed(args.seed)
        self.vae = build_vae()
        if args.start_from:
            load_weights(self.vae, args.start_from)

    def preprocess(self, row, draws):
        """pixel_values [3, 32, 32]."""
        return {"pixel_values": normalize_pixels(row["image"])}

    def encode(self, batch):
        """Nothing is frozen: the pixels themselves."""
        return batch

    def forward(self, encoded, draws):
        """Squared error of the reconstruction, and the divergence from the prior per element of the latents."""
        pixels = encoded["pixel_values"]
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * draws.normal("posterior", posterior.mean.shape[1:])
        divergence = posterior.mean.square() + posterior.var - 1 - posterior.logvar
        return mse_loss(self.vae.decode(latents).sample, pixels) + PRIOR_WEIGHT * 0.5 * divergence.mean()

    def save_weights(self, directory):
        save_model(self.vae, f"{directory}/vae")

    def load_weights(self, directory):
        load_in_place(self.vae, f"{directory}/vae")

    def save_pretrained(self, directory):
        """Write the model's folder, and its weights as the package ships them."""
        scale = latent_std(self.vae)
        self.vae.register_to_config(scaling_factor=1 / scale)
        self.save_weights(directory)
        write_weights(f"{directory}/vae.safetensors", {"": self.vae}, **{LATENT_STD: scale})


@paddle.no_grad()
def latent_std(vae) -> float:
    """The standard deviation of all elements of the latents, over pictures of all looks."""
    rows = ShapesDataset(0, MEASURED_PICTURES)
    pixels = paddle.to_tensor(np.stack([normalize_pixels(rows[index]["image"]) for index in range(len(rows))]))
    return float(vae.encode(pixels).latent_dist.mode().std())


main = job_main(build_parser, VAETrainingModule, recipe.build_shapes)

if __name__ == "__main__":
    main()
