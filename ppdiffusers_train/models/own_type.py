"""Models that compute in their weights' dtype whatever the run's precision, in training and in validation alike."""

import functools

import paddle
from ppdiffusers import AutoencoderKL, VQModel
from ppdiffusers.transformers import T5EncoderModel

from ppdiffusers_train.models.qwen_image.vae import AutoencoderKLQwenImage

# float16's range is too small for the activations of SDXL's VAE and of T5, and bfloat16 too coarse for latents.
AUTOENCODERS = (AutoencoderKL, VQModel, AutoencoderKLQwenImage)
COMPUTING_IN_OWN_TYPE = (*AUTOENCODERS, T5EncoderModel)


def compute_in_own_type(model):
    """Let a VAE, MoVQ or T5 run outside of autocast, whoever calls it. Returns the model.

    A VAE and MoVQ also keep their float32 weights (`keeps_float32`).
    """
    if isinstance(model, COMPUTING_IN_OWN_TYPE):
        model.keeps_float32 = isinstance(model, AUTOENCODERS)
        for name in ("forward", "encode", "decode"):
            if hasattr(model, name):
                # Not by `setattr`: PaddleNLP's models wrap a new `forward` in one that drops arguments.
                vars(model)[name] = _outside_autocast(getattr(model, name), model)
    return model


def _outside_autocast(method, model):
    def in_own_type(value):
        is_float = isinstance(value, paddle.Tensor) and value.is_floating_point()
        return value.astype(model.parameters()[0].dtype) if is_float else value

    @functools.wraps(method)
    def run(*inputs, **options):
        with paddle.amp.auto_cast(enable=False):
            return method(*map(in_own_type, inputs), **{name: in_own_type(value) for name, value in options.items()})

    return run
