"""Settings with which a model of ppdiffusers takes less memory in training."""

from ppdiffusers_train.models.attention import enable_memory_efficient_attention
from ppdiffusers_train.models.attention_slices import enable_sliced_attention
from ppdiffusers_train.models.recompute import enable_recompute


def save_memory(model, recompute: bool, efficient_attention: bool, attention_slices: str) -> None:
    """Let a UNet or a VAE recompute its activations, use Paddle's memory-efficient attention, or attention in slices
    ("auto"), where it is asked for."""
    if recompute:
        enable_recompute(model)
    if efficient_attention:
        enable_memory_efficient_attention(model)
    if attention_slices == "auto":
        enable_sliced_attention(model)
