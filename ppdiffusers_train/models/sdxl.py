"""Stable Diffusion XL on disk, and how its text encoders encode a caption."""

from functools import cached_property

import numpy as np
import paddle
from ppdiffusers import StableDiffusionXLPipeline
from ppdiffusers.transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder
from ppdiffusers_train.models.text import as_computed, join_chunks, split_chunks, tokenize_chunks

VERSION = 2  # raised when its functions change encoded samples


class SDXLFolder(StableDiffusionFolder):
    """The folder of an SDXL pipeline, with a VAE from elsewhere where one is given."""

    pipeline_class = StableDiffusionXLPipeline
    parts = {
        **StableDiffusionFolder.parts,
        "text_encoder_2": CLIPTextModelWithProjection,
        "tokenizer_2": CLIPTokenizer,
    }
    options = {"add_watermarker": False}
    kept_settings = ("force_zeros_for_empty_prompt",)
    unused_layers = 1

    @cached_property
    def no_prompt_is_zeros(self) -> bool:
        """Whether guidance uses zeros for the empty prompt; if not, the embeddings of an empty text."""
        return self.settings().get("force_zeros_for_empty_prompt", True)


def tokenize_caption(
    tokenizer, tokenizer_2, caption: str, is_dropped: bool, no_prompt_is_zeros: bool, chunks: int = 1
) -> dict:
    """The input of `encode_captions`: input_ids, input_ids_2 int64 [L]; has_prompt float32 [], 0 where the caption is
    dropped and its embeddings are to be zeros."""
    caption = "" if is_dropped else caption
    return {
        "input_ids": tokenize_chunks(tokenizer, caption, chunks),
        "input_ids_2": tokenize_chunks(tokenizer_2, caption, chunks),
        "has_prompt": np.float32(not (is_dropped and no_prompt_is_zeros)),
    }


def encode_captions(text_encoder, text_encoder_2, tokens: dict, clip_skip: int = 0, chunks: int = 1) -> dict:
    """prompt_embeds [B, L, D1 + D2], pooled_prompt_embeds [B, D] of the stacked results of `tokenize_caption`."""
    ids = tokens["input_ids"], tokens["input_ids_2"]
    embeds, pooled = encode_prompts(text_encoder, text_encoder_2, *ids, tokens["has_prompt"], clip_skip, chunks)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def encode_prompts(
    text_encoder, text_encoder_2, input_ids, input_ids_2, has_prompt=None, clip_skip=0, chunks=1
) -> tuple:
    """Token ids [B, L] of both tokenizers -> prompt embeddings [B, L, D1 + D2], pooled embedding [B, D].

    The penultimate hidden states of both encoders, and the second one's projection (Podell et al. 2023, arXiv
    2307.01952, section 2.1), or those `clip_skip` layers before; zeros where `has_prompt` [B] is 0. Of a caption in
    several `chunks` the projection is that of the first one.
    """
    first = text_encoder(split_chunks(input_ids, chunks), output_hidden_states=True)
    second = text_encoder_2(split_chunks(input_ids_2, chunks), output_hidden_states=True)
    hidden = paddle.concat([states.hidden_states[-2 - clip_skip] for states in (first, second)], axis=-1)
    embeds, pooled = join_chunks(as_computed(text_encoder_2, hidden), chunks), second[0][::chunks]
    if has_prompt is None:
        return embeds, pooled
    has_prompt = has_prompt.astype(pooled.dtype)
    return embeds * has_prompt.reshape([-1, 1, 1]), pooled * has_prompt.reshape([-1, 1])
