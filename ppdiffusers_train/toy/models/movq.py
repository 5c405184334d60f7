"""The toy's MoVQ: its configuration, and its weights for photographs (`train_movq.py`) and for shapes."""

import paddle
from ppdiffusers import VQModel

from ppdiffusers_train.toy.models.shipped import FOLDER, load_weights

WEIGHTS = FOLDER / "movq.safetensors"
SHAPES_WEIGHTS = FOLDER / "movq_shapes.safetensors"


def build_movq() -> VQModel:
    """A MoVQ of the published structure with random weights: 64×64 pixels to 16×16 latents of 4 channels."""
    movq = VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32, 64),  # its spatial norms have 32 groups, fixed
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        num_vq_embeddings=1024,
        norm_num_groups=8,
        vq_embed_dim=4,
        norm_type="spatial",
    )
    # Spatial norms start as plain norms: with random weights they amplify outliers, and training starts unstably.
    with paddle.no_grad():
        for name, parameter in movq.named_parameters():
            if ".conv_y." in name or ".conv_b." in name:
                parameter.set_value(paddle.full_like(parameter, float(name.endswith("conv_y.bias"))))
    return movq


def load_movq(file=WEIGHTS) -> VQModel:
    """The MoVQ that was trained on photographs of 64x64 pixels, or with `SHAPES_WEIGHTS` on shapes of 32x32."""
    return load_weights(build_movq(), file)
