"""The shapes' VAE for Stable Diffusion, SDXL and SD3: its configuration and trained weights (see `train_vae.py`)."""

from ppdiffusers import AutoencoderKL

from ppdiffusers_train.toy.models.shipped import FOLDER, load_array, load_weights

WEIGHTS = FOLDER / "vae.safetensors"
LATENT_STD = "latent_std"  # in the file: the deviation of all latents of the world


def build_vae(scaling_factor: float = 1.0) -> AutoencoderKL:
    """A VAE with random weights that halves the resolution twice: 32x32 pixels to 8x8 latents of 4 channels."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling_factor,
    )


def load_vae(file=WEIGHTS) -> AutoencoderKL:
    """The trained VAE; its scaling factor normalises latents to unit variance."""
    return load_weights(build_vae(1 / float(load_array(file, LATENT_STD))), file)
