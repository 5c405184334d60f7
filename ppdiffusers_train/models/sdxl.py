"""Stable Diffusion XL on disk, and what its text encoders make of a caption."""

from functools import cached_property

import paddle
from ppdiffusers import StableDiffusionXLPipeline
from ppdiffusers.transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ppdiffusers_train.models.stable_diffusion import StableDiffusionFolder


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

    @cached_property
    def no_prompt_is_zeros(self) -> bool:
        """Whether guidance knows no prompt as zeros; else as the embeddings of an empty text."""
        return self.settings().get("force_zeros_for_empty_prompt", True)


def encode_prompts(text_encoder, text_encoder_2, input_ids, input_ids_2, has_prompt=None) -> tuple:
    """Token ids [B, L] of both tokenizers -> prompt embeddings [B, L, D1 + D2], pooled embedding [B, D].

    The penultimate hidden states of both encoders, and the second one's projection (Podell et al. 2023, arXiv
    2307.01952, section 2.1); zeros where `has_prompt` [B] is 0.
    """
    first = text_encoder(input_ids, output_hidden_states=True)
    second = text_encoder_2(input_ids_2, output_hidden_states=True)
    embeds, pooled = paddle.concat([first.hidden_states[-2], second.hidden_states[-2]], axis=-1), second[0]
    if has_prompt is None:
        return embeds, pooled
    has_prompt = has_prompt.astype(pooled.dtype)
    return embeds * has_prompt.reshape([-1, 1, 1]), pooled * has_prompt.reshape([-1, 1])
