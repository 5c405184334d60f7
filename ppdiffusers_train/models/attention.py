"""Attention kernels."""

import paddle
from paddle.nn import functional

from ppdiffusers_train.models.attention_slices import attend, sliced_attention

VERSION = 1  # raised when its functions change encoded samples
UNSEEN = -3e4  # added to scores of what is not looked at: float16 holds it, and its exponential is 0


def attention(query, key, value, seen=None):
    """softmax(Q Kᵀ / √D) V, [B, L, heads, D] -> the same, by Paddle's kernel where there is one.

    Args:
        seen: which keys a query looks at, boolean [B, 1, L, L]; None: all.
    """
    mask = None if seen is None else seen.logical_not().astype(query.dtype) * UNSEEN
    if not paddle.get_device().startswith("cpu"):
        return functional.scaled_dot_product_attention(query, key, value, mask)
    # Paddle 2.6 has no kernel on CPUs.
    if getattr(functional, "scaled_dot_product_attention_", None) is sliced_attention:
        return sliced_attention(query, key, value, mask)
    return attend(query, key, value, mask, query.shape[-1] ** -0.5)


def provide_joint_attention() -> None:
    """Give Paddle the function that the joint attention of SD3's transformer calls, where ppdiffusers does not.

    ppdiffusers 0.29.0 adds `scaled_dot_product_attention_` to Paddle only where there is a kernel for it, on GPUs.
    Elsewhere every forward pass of that transformer would end in an AttributeError. Paddle's own function without the
    underscore takes the same arguments and gives the same values.
    """
    if not hasattr(functional, "scaled_dot_product_attention_"):
        functional.scaled_dot_product_attention_ = functional.scaled_dot_product_attention


def enable_memory_efficient_attention(model) -> None:
    """Switch a model to Paddle's memory-efficient attention, or print that this device has none."""
    try:
        model.enable_xformers_memory_efficient_attention()
    except (NotImplementedError, ModuleNotFoundError, ValueError) as error:
        announce_plain_attention(str(error).splitlines()[0][:80])


def announce_joint_attention() -> None:
    """Print that the flag has no effect: joint attention uses Paddle's memory-efficient kernel wherever there is one.

    ppdiffusers 0.29.0 would replace it by attention of one stream, and the forward pass would fail.
    """
    flag = "--enable_xformers_memory_efficient_attention"
    print(f"{flag}: no effect, joint attention is memory-efficient wherever Paddle has a kernel for it")


def announce_plain_attention(reason: str, flag: str = "--enable_xformers_memory_efficient_attention") -> None:
    """Print that a flag has no effect, and why."""
    print(f"{flag}: no effect, plain attention is used ({reason})")
