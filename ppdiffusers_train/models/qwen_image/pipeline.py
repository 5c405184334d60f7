"""Qwen-Image's pipeline for inference, with the arguments and the numbers of diffusers' pipeline."""

from dataclasses import dataclass

import numpy as np
import paddle
from PIL import Image
from ppdiffusers.utils.paddle_utils import randn_tensor
from tqdm import tqdm

from ppdiffusers_train.models.lora import load_lora
from ppdiffusers_train.models.qwen_image.loading import (
    PATCH,
    QwenImageFolder,
    encode_captions,
    packed,
    unpacked,
)
from ppdiffusers_train.models.qwen_image.tokenizer import LONGEST

OUTPUT_TYPES = ("pil", "np", "latent")


@dataclass
class QwenImagePipelineOutput:
    """`images`: PIL images, an array [B, H, W, 3] from 0 to 1, or packed latents [B, H / 16 · W / 16, 64]."""

    images: object


class QwenImagePipeline:
    """Text to image.

    Args:
        schedule: `FlowSettings`.
    """

    def __init__(self, transformer, text_encoder, tokenizer, vae, schedule):
        self.transformer, self.text_encoder, self.tokenizer = transformer, text_encoder, tokenizer
        self.vae, self.schedule = vae, schedule
        self.pixels_per_token = PATCH * 2 ** len(vae.config.temperal_downsample)
        self.set_progress_bar_config()

    @classmethod
    def from_pretrained(cls, name_or_path, **options):
        """The pipeline of a folder of diffusers, or from the hub. `options`: `cache_dir`, `revision`, `variant`."""
        return cls.from_folder(QwenImageFolder(name_or_path, **options))

    @classmethod
    def from_folder(cls, folder: QwenImageFolder, **own):
        """The pipeline of a folder. Parts given by name are used; missing ones and those that are None are loaded."""
        parts = {part: folder.load(part) if own.get(part) is None else own[part] for part in folder.parts}
        return cls(**parts, schedule=folder.schedule)

    def load_lora_weights(self, path) -> None:
        """Add a LoRA to the transformer: the result of a training run, or a file for diffusers or ComfyUI."""
        load_lora(self.transformer, path)

    def set_progress_bar_config(self, **options) -> None:
        """Options of tqdm for the bar that counts steps, such as `disable=True`."""
        self.progress_bar_options = options

    @property
    def components(self) -> dict:
        """{name: part}."""
        names = "transformer", "text_encoder", "tokenizer", "vae"
        return {name: getattr(self, name) for name in names}

    @paddle.no_grad()
    def __call__(
        self, prompt, negative_prompt=None, height=1024, width=1024, true_cfg_scale=4.0, num_inference_steps=50,
        generator=None, latents=None, output_type="pil", max_sequence_length=512,
    ) -> QwenImagePipelineOutput:  # fmt: skip
        """Draw an image for each prompt.

        Args:
            prompt, negative_prompt: one, or a list.
            height, width: in pixels, multiples of 16.
            true_cfg_scale: strength of guidance away from the negative prompt; without one, or up to 1, there is none.
            generator: of Paddle, for the noise; or one for each image.
            latents: the noise, packed: [B, height / 16 · width / 16, 64].
            output_type: "pil", "np" or "latent", see `QwenImagePipelineOutput`.
            max_sequence_length: tokens of a prompt that are read, at most 1024.
        Raises:
            ValueError: an argument does not fit.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        grid = self._grid(height, width, output_type, max_sequence_length)
        text = self._encode(prompts, max_sequence_length)
        negative = None
        if negative_prompt is not None and true_cfg_scale > 1:
            given = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
            if len(given) != len(prompts):
                raise ValueError(f"negative_prompt: {len(given)} texts; expected {len(prompts)}, one for each prompt")
            negative = self._encode(given, max_sequence_length)
        if latents is None:
            shape = [len(prompts), self.transformer.config.in_channels // PATCH**2, PATCH * grid[0], PATCH * grid[1]]
            latents = packed(randn_tensor(shape, generator=generator, dtype="float32"))
        latents = self._denoise(latents, text, negative, grid, true_cfg_scale, num_inference_steps)
        if output_type == "latent":
            return QwenImagePipelineOutput(latents)
        return QwenImagePipelineOutput(as_images(self.vae.decode(unpacked(latents, grid)), output_type))

    def _grid(self, height, width, output_type, max_sequence_length) -> tuple:
        side = self.pixels_per_token
        if height % side or width % side:
            raise ValueError(f"height, width: {height} and {width}; expected multiples of {side}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: {output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}")
        if not 0 < max_sequence_length <= LONGEST:
            raise ValueError(f"max_sequence_length: {max_sequence_length}; expected 1 to {LONGEST}")
        return height // side, width // side

    def _encode(self, prompts, longest):
        return encode_captions(self.text_encoder, self.tokenizer(prompts), longest)

    def _denoise(self, latents, text, negative, grid, scale, count):
        """Euler's method from noise, σ = 1, to the image, σ = 0 (Rectified flow, arXiv 2209.03003, section 2.1)."""
        sigmas = self.schedule.sigmas(count, latents.shape[1])
        for sigma, following in tqdm(list(zip(sigmas, [*sigmas[1:], np.float32(0)])), **self.progress_bar_options):
            # The model's input is rounded as diffusers does it, to thousandths and back.
            timestep = paddle.full([latents.shape[0]], float(sigma), "float32") * 1000 / 1000
            velocity = self.transformer(latents, *text, timestep, grid).astype("float32")
            if negative is not None:
                other = self.transformer(latents, *negative, timestep, grid).astype("float32")
                velocity = guided(velocity, other, scale)
            latents = latents + float(following - sigma) * velocity
        return latents


def guided(velocity, negative, scale: float):
    """Classifier-free guidance whose result has the length of `velocity` at every token. [B, L, C], twice."""
    combined = negative + scale * (velocity - negative)
    return combined * (velocity.norm(axis=-1, keepdim=True) / combined.norm(axis=-1, keepdim=True))


def as_images(pixels, output_type: str):
    """Pixels [B, 3, H, W] in [-1, 1] as PIL images or an array [B, H, W, 3] from 0 to 1."""
    array = (pixels.astype("float32") / 2 + 0.5).clip(0, 1).transpose([0, 2, 3, 1]).numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(image) for image in (array * 255).round().astype(np.uint8)]
