"""Qwen-Image's diffusion transformer: text and image are two streams that meet in attention (Wu et al. 2025, arXiv
2508.02324, section 2). Names and shapes are those of diffusers' `QwenImageTransformer2DModel`, whose files load."""

import math

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional
from ppdiffusers import ConfigMixin, ModelMixin
from ppdiffusers.configuration_utils import register_to_config

from ppdiffusers_train.models.attention import attention
from ppdiffusers_train.models.rms_norm import RMSNorm
from ppdiffusers_train.models.rotary import angles, cos_sin, rotate_pairs

TIME_CHANNELS = 256
THETA = 10000  # of rotary positions, and the longest period of the timestep's sines
EPSILON = 1e-6  # of all norms


class QwenImageTransformer2DModel(ModelMixin, ConfigMixin):
    """Predicts the velocity of packed latents.

    Args:
        in_channels: of a token, which is 2x2 latents. out_channels: of a latent.
        joint_attention_dim: width of the text encoder's states.
        axes_dims_rope: how many channels of a head belong to frame, row and column.
    """

    @register_to_config
    def __init__(
        self, patch_size=2, in_channels=64, out_channels=16, num_layers=60, attention_head_dim=128,
        num_attention_heads=24, joint_attention_dim=3584, guidance_embeds=False, axes_dims_rope=(16, 56, 56),
        zero_cond_t=False, use_additional_t_cond=False, use_layer3d_rope=False,
    ):  # fmt: skip
        super().__init__()
        unsupported = {"guidance_embeds": guidance_embeds, "zero_cond_t": zero_cond_t}
        unsupported |= {"use_additional_t_cond": use_additional_t_cond, "use_layer3d_rope": use_layer3d_rope}
        if used := [name for name, value in unsupported.items() if value]:
            raise ValueError(f"{used[0]}: true; expected a Qwen-Image for text to image, which has false")
        width = num_attention_heads * attention_head_dim
        self.time_text_embed = TimestepEmbedding(width)
        self.txt_norm = RMSNorm(joint_attention_dim, EPSILON)
        self.img_in = nn.Linear(in_channels, width)
        self.txt_in = nn.Linear(joint_attention_dim, width)
        self.transformer_blocks = nn.LayerList(
            [TransformerBlock(width, num_attention_heads) for _ in range(num_layers)]
        )
        self.norm_out = FinalNorm(width)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)

    def forward(self, latents, prompt_embeds, prompt_mask, timestep, grid):
        """The velocity of packed latents, [B, h · w, C] -> [B, h · w, patch_size² · out_channels].

        Args:
            prompt_embeds: [B, L, D]. prompt_mask: [B, L], 0 where it is padded; None if it nowhere is.
            timestep: share of noise σ, from 0 to 1, float32 [B].
            grid: (h, w), the image's size in tokens.
        """
        image, text = self.img_in(latents), self.txt_in(self.txt_norm(prompt_embeds))
        time = self.time_text_embed(timestep, image.dtype)
        rotary = self.rotary(*grid, text.shape[1])
        mask = None if prompt_mask is None else attention_mask(prompt_mask, image.shape[1])
        for block in self.transformer_blocks:
            image, text = block(image, text=text, time=time, rotary=rotary, mask=mask)
        return self.proj_out(self.norm_out(image, time))

    def rotary(self, height: int, width: int, text_length: int) -> tuple:
        """Cosines and sines [L + h · w, head size / 2] of text and image. The image's rows and columns are counted from
        its middle, and the text's tokens go on along the diagonal behind its border (section 2.4 of the paper)."""
        rows, columns = np.arange(height) - (height - height // 2), np.arange(width) - (width - width // 2)
        rows, columns = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
        text = max(height // 2, width // 2) + np.arange(text_length)
        places = [np.concatenate([text, axis]) for axis in (np.zeros_like(rows), rows, columns)]
        sizes = self.config.axes_dims_rope
        return cos_sin(np.concatenate([angles(*pair, THETA) for pair in zip(places, sizes)], axis=-1))


def attention_mask(prompt_mask, image_length: int):
    """[B, L] -> which of all L + image_length tokens are looked at, boolean [B, 1, L + image_length, the same]."""
    batch, length = prompt_mask.shape
    seen = paddle.concat([prompt_mask.astype("bool"), paddle.ones([batch, image_length], "bool")], axis=1)
    total = length + image_length
    return seen.reshape([batch, 1, 1, total]).expand([batch, 1, total, total])


class TimestepEmbedding(nn.Layer):
    """The share of noise [B] as a vector [B, width]: sines of 1000 σ, and two layers."""

    def __init__(self, width):
        super().__init__()
        self.timestep_embedder = nn.Layer()
        self.timestep_embedder.linear_1 = nn.Linear(TIME_CHANNELS, width)
        self.timestep_embedder.linear_2 = nn.Linear(width, width)

    def forward(self, timestep, dtype):
        half = TIME_CHANNELS // 2
        exponents = np.float32(-math.log(THETA)) * np.arange(half, dtype=np.float32) / np.float32(half)
        # Rounded once from double precision: angles go up to 1000, where a rounding of one part in 2^24 can be seen.
        frequencies = paddle.to_tensor(np.exp(exponents.astype(np.float64)).astype(np.float32))
        turned = timestep.astype("float32").unsqueeze(-1) * frequencies * 1000
        waves = paddle.concat([turned.cos(), turned.sin()], axis=-1).astype(dtype)
        layers = self.timestep_embedder
        return layers.linear_2(functional.silu(layers.linear_1(waves)))


class TransformerBlock(nn.Layer):
    """One block of both streams. Each has its own layers; the timestep shifts, scales and gates them."""

    def __init__(self, width, heads):
        super().__init__()
        self.img_mod = nn.Sequential(nn.Silu(), nn.Linear(width, 6 * width))
        self.attn = JointAttention(width, heads)
        self.img_mlp = FeedForward(width)
        self.txt_mod = nn.Sequential(nn.Silu(), nn.Linear(width, 6 * width))
        self.txt_mlp = FeedForward(width)

    def forward(self, image, text, time, rotary, mask):
        """image [B, h · w, D], text [B, L, D], time [B, D] -> image, text."""
        image_parts = self.img_mod(time).unsqueeze(1).chunk(6, axis=-1)
        text_parts = self.txt_mod(time).unsqueeze(1).chunk(6, axis=-1)
        results = self.attn(modulated(image, *image_parts[:2]), modulated(text, *text_parts[:2]), rotary, mask)
        image, text = image + image_parts[2] * results[0], text + text_parts[2] * results[1]
        image = image + image_parts[5] * self.img_mlp(modulated(image, *image_parts[3:5]))
        text = text + text_parts[5] * self.txt_mlp(modulated(text, *text_parts[3:5]))
        return image, text


def modulated(x, shift, scale):
    """Norm without weights, then scaled and shifted: x [B, L, D], shift and scale [B, 1, D]."""
    return functional.layer_norm(x, x.shape[-1], None, None, EPSILON) * (1 + scale) + shift


class JointAttention(nn.Layer):
    """Attention over text and image together, with a layer of its own for each stream."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            setattr(self, name, nn.Linear(width, width))
        self.to_out = nn.LayerList([nn.Linear(width, width)])
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, RMSNorm(width // heads, EPSILON))

    def forward(self, image, text, rotary, mask):
        """image [B, h · w, D], text [B, L, D] -> the same."""
        query = self.joined(text, self.add_q_proj, self.norm_added_q, image, self.to_q, self.norm_q)
        key = self.joined(text, self.add_k_proj, self.norm_added_k, image, self.to_k, self.norm_k)
        value = self.joined(text, self.add_v_proj, None, image, self.to_v, None)
        query, key = rotate_pairs(query, *rotary), rotate_pairs(key, *rotary)
        found = attention(query, key, value, mask).flatten(2)
        length = text.shape[1]
        return self.to_out[0](found[:, length:]), self.to_add_out(found[:, :length])

    def joined(self, text, text_layer, text_norm, image, image_layer, image_norm):
        """Both streams through their layers and norms, one after the other: [B, L + h · w, heads, D / heads]."""
        parts = []
        for x, layer, norm in ((text, text_layer, text_norm), (image, image_layer, image_norm)):
            projected = layer(x)
            projected = projected.reshape([*projected.shape[:2], self.heads, -1])
            parts.append(projected if norm is None else norm(projected))
        return paddle.concat(parts, axis=1)


class FeedForward(nn.Layer):
    """Two layers with GELU (its approximation by tanh) between them. [B, L, D] -> [B, L, D]."""

    def __init__(self, width):
        super().__init__()
        first = nn.Layer()
        first.proj = nn.Linear(width, 4 * width)
        self.net = nn.LayerList([first, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x):
        return self.net[2](functional.gelu(self.net[0].proj(x), approximate=True))


class FinalNorm(nn.Layer):
    """The last norm, which the timestep scales and shifts. [B, L, D], [B, D] -> [B, L, D]."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x, time):
        scale, shift = self.linear(functional.silu(time)).unsqueeze(1).chunk(2, axis=-1)
        return modulated(x, shift, scale)
