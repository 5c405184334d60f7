"""Settings with which a UNet of ppdiffusers takes less memory in training."""

from ppdiffusers_train.models.attention import enable_memory_efficient_attention
from ppdiffusers_train.models.recompute import enable_recompute


def save_memory(unet, recompute: bool, efficient_attention: bool) -> None:
    """Let a UNet recompute its activations and use Paddle's memory-efficient attention, where either is asked for."""
    if recompute:
        enable_recompute(unet)
    if efficient_attention:
        enable_memory_efficient_attention(unet)
