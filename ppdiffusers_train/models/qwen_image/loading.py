"""Qwen-Image on disk: a folder of diffusers, as published; and how it encodes a caption and an image."""

import paddle

from ppdiffusers_train.batches import concat_padded
from ppdiffusers_train.models import attention, rms_norm, rotary
from ppdiffusers_train.models.pipeline_folder import PipelineFolder
from ppdiffusers_train.models.qwen_image import text_encoder, tokenizer, vae
from ppdiffusers_train.models.qwen_image.text_encoder import QwenTextEncoder
from ppdiffusers_train.models.qwen_image.tokenizer import SKIPPED, QwenTokenizer
from ppdiffusers_train.models.qwen_image.transformer import QwenImageTransformer2DModel
from ppdiffusers_train.models.qwen_image.vae import AutoencoderKLQwenImage
from ppdiffusers_train.models.text import as_computed
from ppdiffusers_train.objectives.flow_matching import FlowSettings

VERSION = 1  # raised when its functions change encoded samples
# Of the models' own code, which a cache of encoded samples has to know as it knows the versions of libraries.
VERSIONS = [module.VERSION for module in (attention, rms_norm, rotary, text_encoder, tokenizer, vae)]
PIPELINE = "QwenImagePipeline"
PATCH = 2  # side of a token, in latents


class QwenImageFolder:
    """The folder of a Qwen-Image pipeline.

    Args:
        name_or_path: a folder, or a name on the hub.
        flag: the flag that named it, for messages.
        options: of `PipelineFolder`.
    Raises:
        UserError: it is no Qwen-Image, or one whose parts do not fit together.
    """

    parts = {
        "vae": AutoencoderKLQwenImage,
        "text_encoder": QwenTextEncoder,
        "tokenizer": QwenTokenizer,
        "transformer": QwenImageTransformer2DModel,
    }

    def __init__(self, name_or_path, flag="from_pretrained", **options):
        self.base = PipelineFolder(name_or_path, flag, [*self.parts, "scheduler"], **options)
        found = self.base.index().get("_class_name")
        if found != PIPELINE:
            raise self.base._error(f"is a {found}; expected a {PIPELINE}")
        taken, given = self.base.config("transformer").get("in_channels", 64), self.base.config("vae").get("z_dim", 16)
        if taken != PATCH**2 * given:
            raise self.base._error(f"has a transformer that takes {taken} channels; expected {PATCH**2 * given}")
        try:
            self.schedule = FlowSettings.read(self.base.config("scheduler"))
        except ValueError as error:
            raise self.base._error(f"has a scheduler of {error}") from error

    def load(self, part: str):
        """A part."""
        return self.base.load(part, self.parts[part])

    def later(self, part: str):
        """A model of the pipeline that is loaded when it is used."""
        return self.base.later(part, self.parts[part])

    def files(self) -> dict:
        """`{part: its files}` of the pipeline."""
        return {part: self.base.files(part) for part in (*self.parts, "scheduler")}

    def pixels_per_token(self) -> int:
        """Side, in pixels, of the square that becomes one token of the transformer."""
        return PATCH * 2 ** len(self.base.config("vae").get("temperal_downsample", (False, True, True)))


def packed(latents):
    """Latents [B, C, h, w] as tokens of 2x2, [B, h / 2 · w / 2, 4 C], as the transformer takes them."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape([batch, channels, height // PATCH, PATCH, width // PATCH, PATCH])
    return squares.transpose([0, 2, 4, 1, 3, 5]).reshape([batch, -1, channels * PATCH**2])


def unpacked(tokens, grid):
    """The reverse of `packed`. `grid`: (h / 2, w / 2)."""
    (height, width), (batch, _, channels) = grid, tokens.shape
    squares = tokens.reshape([batch, height, width, channels // PATCH**2, PATCH, PATCH])
    return squares.transpose([0, 3, 1, 4, 2, 5]).reshape([batch, -1, height * PATCH, width * PATCH])


def encode_caption(text_encoder, input_ids):
    """Token ids of one caption in its template [1, L] -> its prompt embeddings [1, L - SKIPPED, D]."""
    return as_computed(text_encoder, text_encoder(input_ids)[:, SKIPPED:])


def encode_captions(text_encoder, tokens: list, longest=None) -> tuple:
    """Token ids [L] of several captions -> prompt embeddings [B, L, D], and their mask [B, L], None if it is all 1.

    Args:
        longest: tokens that are kept of a caption.
    """
    states = [encode_caption(text_encoder, paddle.to_tensor(ids).unsqueeze(0))[:, :longest] for ids in tokens]
    masks = [paddle.ones(state.shape[:2], "int64") for state in states]
    same = len({state.shape[1] for state in states}) == 1
    return concat_padded(states), None if same else concat_padded(masks)
