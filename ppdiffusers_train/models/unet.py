"""Settings with which a model of ppdiffusers takes less memory in training."""

from ppdiffusers_train.models.attention import enable_memory_efficient_attention
from ppdiffusers_train.models.attention_slices import enable_sliced_attention
from ppdiffusers_train.models.recompute import enable_recompute


def save_memory(model, args) -> None:
    """Let a UNet or a VAE recompute its activations, use Paddle's memory-efficient attention, or attention in slices,
    where the flags ask for it."""
    if args.gradient_checkpointing:
        enable_recompute(model)
    if args.enable_xformers_memory_efficient_attention:
        enable_memory_efficient_attention(model)
    if args.attention_slices == "auto":
        enable_sliced_attention(model)
