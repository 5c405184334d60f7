"""Transformer and scheduler of a tiny Stable Diffusion 3, with all code paths of the published ones."""

from ppdiffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)

EMBEDDING = 32  # of each of CLIP's text encoders
LARGEST_SIDE = 32  # of an image, in tokens
SHIFT_FACTOR = 0.0609  # the published VAE's


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The published model's scheduler."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def build_transformer(layers=2, heads=2, sample_size=16, channels=16, embedding=EMBEDDING) -> SD3Transformer2DModel:
    """A transformer of 16 channels per head, whose tokens are 2x2 latents of `channels` channels each.

    Args:
        sample_size: of the latents; their position embeddings are the middle of a larger table.
        embedding: width of each of CLIP's text encoders; T5 is as wide as both together.
    """
    return SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=2 * embedding,
        caption_projection_dim=16 * heads,
        pooled_projection_dim=2 * embedding,
        pos_embed_max_size=LARGEST_SIDE,
    )
