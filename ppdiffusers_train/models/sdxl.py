"""Stable Diffusion XL on disk, and what its text encoders make of a caption."""

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


def encode_prompts(text_encoder, text_encoder_2, input_ids, input_ids_2) -> tuple:
    """Token ids [B, L] of both tokenizers -> prompt embeddings [B, L, D1 + D2], pooled embedding [B, D].

    The penultimate hidden states of both encoders, and the second one's projection (Podell et al. 2023, arXiv
    2307.01952, section 2.1).
    """
    first = text_encoder(input_ids, output_hidden_states=True)
    second = text_encoder_2(input_ids_2, output_hidden_states=True)
    return paddle.concat([first.hidden_states[-2], second.hidden_states[-2]], axis=-1), second[0]
