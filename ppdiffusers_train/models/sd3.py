"""Stable Diffusion 3 on disk, and how its text encoders encode a caption."""

import paddle
from paddle.nn import functional
from ppdiffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from ppdiffusers.models.normalization import AdaLayerNormContinuous
from ppdiffusers.transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.attention import provide_joint_attention
from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder
from ppdiffusers_train.models.text import as_computed, count_tokens, tokenize
from ppdiffusers_train.module import keep_frozen

VERSION = 2  # raised when its functions change encoded samples

INPUT_IDS = ("input_ids", "input_ids_2", "input_ids_3")
T5_PARTS = {"text_encoder_3": T5EncoderModel, "tokenizer_3": T5Tokenizer}


class SD3Folder(StableDiffusionFolder):
    """The folder of an SD3 pipeline, with a VAE from elsewhere where one is given.

    Args:
        t5: whether the third text encoder is used; without it, the pipeline is one with `text_encoder_3=None`.
    """

    pipeline_class = StableDiffusion3Pipeline
    parts = {
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer_2": CLIPTokenizer,
        **T5_PARTS,
        "transformer": SD3Transformer2DModel,
        "scheduler": None,  # its class is the one that the pipeline's model_index.json names
    }
    options = {}
    kept_settings = ()

    def __init__(self, *names, t5=True, **options):
        provide_joint_attention()
        if not t5:
            self.parts = {name: part for name, part in self.parts.items() if name not in T5_PARTS}
            self.options = dict.fromkeys(T5_PARTS)
        try:
            super().__init__(*names, **options)
        except UserError as error:
            is_without = any(f"has no part {part!r}" in str(error) for part in T5_PARTS)
            if not is_without:
                raise
            raise UserError(f"{error}; --no_t5 trains without T5") from error

    @property
    def tokenizers(self) -> list:
        """Names of the tokenizers, in the order of the text encoders."""
        return [name for name in self.parts if name.startswith("tokenizer")]

    @property
    def text_encoders(self) -> list:
        """Names of the text encoders that are used."""
        return [name for name in self.parts if name.startswith("text_encoder")]

    def load(self, part: str, part_class=None):
        """A part. Parameters of the transformer that the published model does not have are frozen for good."""
        model = super().load(part, part_class)
        if part == "transformer":
            freeze_unpublished_biases(model)
        return model

    def load_scheduler(self, shift=None):
        """The pipeline's scheduler, with another timestep shift where one is given."""
        scheduler = self.load("scheduler")
        return type(scheduler).from_config(scheduler.config, shift=shift) if shift else scheduler

    def pixels_per_token(self) -> int:
        """Side, in pixels, of the square that becomes one token of the transformer."""
        return super().pixels_per_token() * self.base.config("transformer")["patch_size"]


def freeze_unpublished_biases(transformer) -> None:
    """Freeze the biases that ppdiffusers 0.29.0 gives to norms which have none in the published model.

    They are zero and stay so: diffusers has no such parameters, so trained values would be lost there.
    """
    for layer in transformer.sublayers():
        if isinstance(layer, AdaLayerNormContinuous):
            keep_frozen(layer.norm.bias)


def tokenize_caption(tokenizers: list, caption: str, t5_length=None) -> dict:
    """input_ids, input_ids_2, and with T5 input_ids_3, [L] each, L the first tokenizer's length as in the pipeline.

    Args:
        t5_length: L of T5, where it is another.
    """
    length = tokenizers[0].model_max_length
    lengths = length, length, t5_length or length
    parts = zip(INPUT_IDS, tokenizers, lengths)
    return {name: tokenize(tokenizer, caption, length)[0] for name, tokenizer, length in parts}


def check_prompts(prompts, tokenizers: list) -> None:
    """Refuse prompts that ppdiffusers' pipeline (0.29.0) would truncate: it fails where it reports that.

    Args:
        prompts: of `--validation_prompts`, or None.
    Raises:
        UserError: one is too long for one of the tokenizers.
    """
    limit = tokenizers[0].model_max_length
    for prompt in prompts or ():
        longest = max(count_tokens(tokenizer, prompt) for tokenizer in tokenizers)
        if longest >= limit:
            raise UserError(f"--validation_prompts: {prompt[:40]!r}… has {longest} tokens; expected below {limit}")


def encode_captions(text_encoders: list, tokens: dict, width: int) -> dict:
    """prompt_embeds [B, L + L3, D], pooled_prompt_embeds [B, P1 + P2] of the stacked results of `tokenize_caption`.

    CLIP's penultimate hidden states side by side, padded with zeros to D; after them T5's last hidden states, or zeros
    without T5; and CLIP's two projections (Esser et al. 2024, arXiv 2403.03206, section 4 and appendix B).

    Args:
        text_encoders: two of CLIP and, where it is used, T5's.
        width: D, the transformer's `joint_attention_dim`.
    """
    first = text_encoders[0](tokens["input_ids"], output_hidden_states=True)
    second = text_encoders[1](tokens["input_ids_2"], output_hidden_states=True)
    clip = paddle.concat([first.hidden_states[-2], second.hidden_states[-2]], axis=-1)
    clip = functional.pad(clip, [0, width - clip.shape[-1]], data_format="NCL")
    t5 = paddle.zeros_like(clip)
    if len(text_encoders) > 2:
        t5 = text_encoders[2](tokens["input_ids_3"])[0].astype(clip.dtype)
    return {
        "prompt_embeds": as_computed(text_encoders[1], paddle.concat([clip, t5], axis=1)),
        "pooled_prompt_embeds": paddle.concat([first[0], second[0]], axis=-1),
    }
