"""The pipelines of the world of shapes: Kandinsky 2.2 that has learned to draw it.

    write_kandinsky("kandinsky")  # kandinsky/prior and kandinsky/decoder, as the hub has them

Every class and every path of the published models is there; `make toys` trains what is shipped.
"""

from pathlib import Path

import paddle
from ppdiffusers import KandinskyV22Pipeline

from ppdiffusers_train.toy import kandinsky2_2, movq, towers
from ppdiffusers_train.toy.shipped import FOLDER, load_weights
from ppdiffusers_train.toy.tokenizer import build_tokenizer
from ppdiffusers_train.toy.words import vocabulary

PRIOR, DECODER = (FOLDER / f"{name}.safetensors" for name in ("prior", "decoder"))

CHANNELS = (32, 64)  # of the UNet, at 8x8 and 4x4 latents
PRIOR_LAYERS = 4
LATENT_SIZE = 8
TOKENS = 24  # of a caption; the longest wording has 16

# The decoder predicts velocity: what is to be drawn is decided at high noise, where epsilon hardly depends on it.
PREDICTION_TYPE = "v_prediction"


def write_kandinsky(directory, trained=True) -> tuple:
    """Write a prior pipeline and a decoder pipeline.

    Args:
        directory: gets the folders `prior` and `decoder`.
        trained: whether the prior and the UNet have learned; the encoders always have.
    Returns:
        The two folders: (prior, decoder).
    """
    prior_folder, decoder_folder = Path(directory) / "prior", Path(directory) / "decoder"
    paddle.seed(0)
    prior, unet = kandinsky2_2.build_prior(PRIOR_LAYERS, TOKENS), kandinsky2_2.build_unet(CHANNELS, LATENT_SIZE)
    mean, std = towers.load_embedding_statistics()
    prior.clip_mean.set_value(mean)
    prior.clip_std.set_value(std)
    if trained:
        load_weights(prior, PRIOR)
        load_weights(unet, DECODER)
    tokenizer = build_tokenizer(prior_folder / "tokenizer", vocabulary(), TOKENS)
    kandinsky2_2.assemble_prior_pipeline(
        tokenizer, towers.load_text_tower(tokenizer), towers.load_vision_tower(), prior
    ).save_pretrained(str(prior_folder))
    KandinskyV22Pipeline(
        unet=unet, scheduler=kandinsky2_2.build_scheduler(PREDICTION_TYPE), movq=movq.load_movq(movq.SHAPES_WEIGHTS)
    ).save_pretrained(str(decoder_folder))
    return prior_folder, decoder_folder
